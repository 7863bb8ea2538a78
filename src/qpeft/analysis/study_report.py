"""The folder of a study: results as JSON, figures, a page, and a summary in words written from the numbers."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from qpeft.analysis.ablation import NONE
from qpeft.analysis.pages import render
from qpeft.analysis.study import Finding, Study
from qpeft.analysis.study_figures import Drawn, write_figures
from qpeft.analysis.study_intervals import Interval, is_clear
from qpeft.atomic import make_folder
from qpeft.data.files import write_text
from qpeft.evaluation.table_formats import markdown_table
from qpeft.evaluation.tables import Cell, Table, interval, number

TITLES = {
    "layers": "In which layers relevance is learned",
    "projections": "In which projections relevance is learned",
    "components": "Attention or the MLP",
    "ranks": "How much rank relevance needs",
    "checkpoints": "How relevance comes in training",
    "losses": "What trained relevance best",
}
_PER = 100_000


def write_study(study: Study, folder: Path) -> None:
    """Write `study.json`, the figures, `summary.md` and `report.html`; each file appears whole or not at all.

    Raises:
        InputError: a file cannot be made.
    """
    make_folder(folder)
    drawn = write_figures(study, folder)
    with write_text(folder / "summary.md") as file:
        file.write(summary(study))
    with write_text(folder / "report.html") as file:
        file.write(page(study, drawn))
    with write_text(folder / "study.json") as file:
        file.write(json.dumps(study.as_dict(), ensure_ascii=False) + "\n")


def summary(study: Study) -> str:
    """Return what was found as Markdown: sentences, then the table."""
    found = "\n".join(f"* {each}" for each in sentences(study))
    return "\n\n".join([f"# {TITLES[study.study]}", what(study), found, markdown_table(table(study))])


def page(study: Study, drawn: Sequence[Drawn]) -> str:
    """Return the page: no network, no scripts, readable on light and dark."""
    context = {
        "title": TITLES[study.study],
        "what": what(study),
        "sentences": list(sentences(study)),
        "figures": drawn,
        "findings": table(study),
        "adapters": adapters_table(study),
        "made": study.made,
    }
    return render("study.html", context)


def what(study: Study) -> str:
    """Return what was measured, in a sentence."""
    count = len(study.subjects)
    return (
        f"{study.measure} on {study.collection}: {len(study.queries):,} queries × {study.depth} candidates, "
        f"{count} adapter{'s' * (count > 1)} of {study.subjects[0]['method']}."
    )


def sentences(study: Study) -> Iterator[str]:
    """Yield what the numbers say, each with its interval; what is within chance is called so."""
    full, none = study.find(study.full), study.find(NONE)
    if full is not None and none is not None:
        yield (
            f"{_capital(full.name)}: {number(full.mean, 3)}; no additions: {number(none.mean, 3)}. That is "
            f"a gain of {_signed(full.gain, full.gain_interval)}, with {full.parameters:,} trained parameters."
        )
        if not is_clear(full.gain_interval):
            yield "That gain is within chance, so shares of it say nothing."
    yield from {
        "layers": _of_layers,
        "projections": _of_projections,
        "components": _of_components,
        "ranks": _of_order,
        "checkpoints": _of_order,
        "losses": _of_losses,
    }[study.study](study)
    run, would = study.work["layers_run"], study.work["layers_without_sharing"]
    if run < would:
        yield f"States that ablations have in common were computed once: {run:,} layer runs instead of {would:,}."
    if study.work["why_not"]:
        yield f"{'Nothing' if not would else 'For some queries nothing'} was shared: {study.work['why_not']}."


def _of_layers(study: Study) -> Iterator[str]:
    for kind, words in (
        ("all but one layer", "Without one layer"),
        ("all but a window", "Without a window of layers"),
    ):
        yield from _worst(study.of(kind), words)
    for kind, words in (("one layer alone", "One layer alone"), ("a window alone", "A window of layers alone")):
        yield from _best(study.of(kind), words)
    full = study.find(study.full)
    if full is None or not is_clear(full.gain_interval):
        return
    for kind, words in (("from the bottom", "lowest"), ("from the top", "highest")):
        enough = [each for each in study.of(kind) if each.drop_interval and each.drop_interval[0] <= 0]
        if enough:
            least = min(enough, key=lambda each: each.x)
            layers = f"{words} layer is" if least.x == 1 else f"{words} {least.x:g} layers are"
            yield (
                f"Alone, the {layers} not clearly worse than all: {number(least.mean, 3)}, "
                f"a drop of {_signed(least.drop, least.drop_interval)}."
            )


def _of_projections(study: Study) -> Iterator[str]:
    yield from _worst(study.of("all but one projection"), "Without one projection")
    yield from _best(study.of("one projection alone"), "One projection alone")
    alone = [each for each in study.of("one projection alone") if is_clear(each.gain_interval)]
    if alone:
        dense = max(alone, key=lambda each: each.gain / each.parameters)
        yield (
            f"By its parameters, {dense.name} alone gains most: {number(_per(dense), 3, signed=True)} "
            f"per {_PER:,} parameters."
        )
    yield from _worst(study.of("grid, all but one"), "Without one addition")
    yield from _best(study.of("grid, one alone"), "One addition alone")


def _of_components(study: Study) -> Iterator[str]:
    for each in [*study.of("trained with"), *study.of("one component acts")]:
        if each.name == study.full:
            continue
        yield (
            f"{_capital(each.name)} ({each.parameters:,} parameters): {number(each.mean, 3)}, "
            f"{_percent(each.share, each.share_interval)} of the measure with both, and "
            f"{_percent(each.recovered, each.recovered_interval)} of its gain."
        )


def _of_order(study: Study) -> Iterator[str]:
    found = [*study.of("rank"), *study.of("step")]
    if not found:
        return
    best = max(found, key=lambda each: each.mean)
    yield f"The best is {best.name}: {number(best.mean, 3)}, a gain of {_signed(best.gain, best.gain_interval)}."
    better = [each for each in found if each.drop_interval and each.drop_interval[1] < 0]
    if better:
        gained = (f"{each.name} (a drop of {_signed(each.drop, each.drop_interval)})" for each in better)
        yield f"Clear of chance, better than {study.full}: {', '.join(gained)}."
    enough = [each for each in found if each not in better and each.drop_interval and each.drop_interval[0] <= 0]
    if len(enough) > 1:
        yield (
            f"From {enough[0].name} on the difference to {study.full} is within chance: "
            f"{_signed(enough[0].drop, enough[0].drop_interval)}."
            if all(each in enough for each in found[found.index(enough[0]) :])
            else f"Within chance of {study.full} are: {', '.join(each.name for each in enough)}."
        )


def _of_losses(study: Study) -> Iterator[str]:
    for each in study.of("loss"):
        if each.name != study.full:
            yield (
                f"{_capital(each.name)}: {number(each.mean, 3)}, {study.full} minus it "
                f"{_signed(each.drop, each.drop_interval)}."
            )


def _worst(found: Sequence[Finding], words: str) -> Iterator[str]:
    if not found:
        return
    worst = max(found, key=lambda each: each.drop)
    clear = [each for each in found if is_clear(each.drop_interval) and each.drop > 0]
    told = f"{worst.name}: a drop of {_signed(worst.drop, worst.drop_interval)}"
    if clear:
        count = f"{len(clear)} of {len(found)} drops are clear of chance{_named(clear)}"
        yield f"{words}, most is lost {told}; {count}."
    else:
        yield f"{words}, none of {len(found)} drops is clear of chance; the largest is {told}."


def _best(found: Sequence[Finding], words: str) -> Iterator[str]:
    if not found:
        return
    best = max(found, key=lambda each: each.gain)
    clear = [each for each in found if is_clear(each.gain_interval) and each.gain > 0]
    told = f"{best.name}: {_signed(best.gain, best.gain_interval)}"
    if not clear:
        yield f"{words}, none of {len(found)} gains is clear of chance; the largest is of {told}."
        return
    whole = "" if best.recovered_interval is None else f", {_percent(best.recovered, best.recovered_interval)} of all's"
    yield (
        f"{words}, most is gained with {told}{whole}; "
        f"{len(clear)} of {len(found)} gains are clear of chance{_named(clear)}."
    )


def table(study: Study) -> Table:
    """Return one row per line of the study."""
    rows = tuple(
        (
            Cell(each.kind),
            Cell(each.name),
            Cell(f"{each.parameters:,}"),
            Cell(number(each.mean, 4) + (f" ± {statistics.stdev(each.means):.4f}" if len(each.means) > 1 else "")),
            Cell(_signed(each.drop, each.drop_interval)),
            Cell(_signed(each.gain, each.gain_interval)),
            Cell(number(_per(each), 4, signed=True) if each.parameters else "–"),
            Cell(_percent(each.share, each.share_interval)),
            Cell(_percent(each.recovered, each.recovered_interval)),
        )
        for each in study.findings
    )
    header = (
        "question", "what acts", "parameters", study.measure, "drop", "gain", f"gain per {_PER:,}", "share of measure",
        "share of gain",
    )  # fmt: skip
    note = (
        f"drop: from {study.full}; gain: over the adapters of that line without additions; in brackets 95 % bootstrap "
        "intervals over queries and seeds, not corrected for the number of lines"
    )
    spread = "; ±: standard deviation over seeds" if any(len(each.means) > 1 for each in study.findings) else ""
    return Table(header, rows, (note + spread,), names=2)


def adapters_table(study: Study) -> Table:
    """Return one row per adapter."""
    rows = tuple(
        tuple(
            Cell("–" if subject[key] is None else f"{subject[key]:,}" if key == "parameters" else str(subject[key]))
            for key in ("folder", "component", "rank", "seed", "step", "parameters")
        )
        for subject in study.subjects
    )
    return Table(("adapter", "trained", "rank", "seed", "step", "parameters"), rows, (), names=2)


def _per(each: Finding) -> float:
    return each.gain / each.parameters * _PER


def _signed(value: float, bounds: Interval) -> str:
    return number(value, 3, signed=True) + (f" [{interval(bounds, 3, signed=True)}]" if bounds else "")


def _percent(value: float | None, bounds: Interval) -> str:
    if value is None or bounds is None:
        return "–"
    return f"{100 * value:.0f} % [{100 * bounds[0]:.0f} … {100 * bounds[1]:.0f}]".replace("-", "−")


def _named(found: Sequence[Finding]) -> str:
    return f" ({', '.join(each.name for each in found)})" if 0 < len(found) <= 8 else ""


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
