"""Write results into docs/relevance-study.md: between its marks, from the files of results/ and nothing else.

    python recipes/relevance-study/table.py            fill the page
    python recipes/relevance-study/table.py --check    fail where it says anything else
    python recipes/relevance-study/table.py --again    before, draw, and take what follows from the lines' values, anew

What has no file is "not measured yet". Differences, shares and intervals are always taken from each line's values for
each query and each seed, so that they are what the present code says, whichever wrote the file.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import json
import re
import shutil
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

from cells import COLLECTIONS, COMPARED, LOSSES, PARTS, RANK, Cell, other_losses, tried

from qpeft.analysis.ablation import NONE
from qpeft.analysis.study import Finding, Study
from qpeft.analysis.study_figures import write_figures
from qpeft.analysis.study_intervals import Interval
from qpeft.data.files import write_text
from qpeft.evaluation.tables import interval, number

HERE = Path(__file__).parent
RESULTS, DOCS = HERE / "results", HERE.parents[1] / "docs" / "relevance-study.md"
MISSING = "not measured yet"
Answer = Callable[[Study], str]


@functools.cache
def read(path: Path) -> Study | None:
    """Return a finished study, if there is one."""
    return Study.from_dict(json.loads(path.read_text(encoding="utf-8"))).compared_again() if path.is_file() else None


def renew(path: Path) -> None:
    """Take what follows from the values of a study's lines anew, and draw its pictures beside it."""
    read.cache_clear()
    study = read(path)
    assert study is not None
    with write_text(path) as file:
        file.write(json.dumps(study.as_dict()) + "\n")
    with tempfile.TemporaryDirectory() as folder:
        for drawn in write_figures(study, Path(folder)):
            shutil.copyfile(Path(folder) / f"{drawn.name}.png", path.with_name(f"{path.stem}-{drawn.name}.png"))


def signed(value: float, bounds: Interval) -> str:
    """Return a difference with its interval."""
    return number(value, 3, signed=True) + (f" [{interval(bounds, 3, signed=True)}]" if bounds else "")


def share(value: float | None, bounds: Interval) -> str:
    """Return a share in per cent with its interval, or that it is not defined."""
    if value is None or bounds is None:
        return "no share: the gain with both is not clear of 0"
    return f"{100 * value:.0f} % [{100 * bounds[0]:.0f} … {100 * bounds[1]:.0f}]".replace("-", "−")


def reached(each: Finding) -> str:
    """Return the measure of a line, and that of each seed where they differ."""
    seeds = f" ({', '.join(number(mean, 3) for mean in each.means)})" if len(set(each.means)) > 1 else ""
    return number(each.mean, 3) + seeds


def alone(study: Study, modules: str, equal: bool) -> Finding | None:
    """Return the line of a component trained alone: at one rank with both, or with as many parameters."""
    name = f"trained: {modules}, rank {RANK}"
    found = [each for each in study.of("trained with") if each.name.startswith(f"trained: {modules}, ")]
    return next((each for each in found if (each.name != name) == equal), None)


def apart(equal: bool) -> Answer:
    """Return the MLP trained alone minus attention trained alone."""

    def answer(study: Study) -> str:
        lines = [alone(study, modules, equal) for modules in ("mlp", "attention")]
        found = study.difference(*("" if each is None else each.name for each in lines))
        return MISSING if found is None else signed(*found)

    return answer


def trained(modules: str, equal: bool = False) -> Answer:
    """Return what a component trained alone reaches."""

    def answer(study: Study) -> str:
        found = alone(study, modules, equal)
        if found is None:
            return MISSING
        return (
            f"{found.name.rpartition(', ')[2]}: {reached(found)} with {found.parameters:,} parameters; "
            f"of the gain {share(found.recovered, found.recovered_interval)}, "
            f"of the measure {share(found.share, found.share_interval)}"
        )

    return answer


def afterwards(study: Study) -> str:
    """Return what each component of adapters trained with both does alone."""
    found = [study.find(f"{name} of both") for name in ("attention", "mlp")]
    return "; ".join(
        f"{each.name.partition(' ')[0]} {reached(each)}, gain {signed(each.gain, each.gain_interval)}"
        for each in found
        if each is not None
    )


def whole(study: Study) -> str:
    """Return what all additions reach."""
    full = study.find(study.full)
    none = study.find(NONE)
    if full is None or none is None:
        return MISSING
    return f"{reached(full)}, none {reached(none)}: gain {signed(full.gain, full.gain_interval)}"


def by_loss(study: Study) -> str:
    """Return what each loss reaches, and how far the others are from the first."""
    return "; ".join(
        f"{each.name.removeprefix('loss ')} {reached(each)}"
        + ("" if each.name == study.full else f", {signed(-each.drop, turned(each.drop_interval))}")
        for each in reversed(study.of("loss"))
    )


def turned(bounds: Interval) -> Interval:
    """Return the interval of the negative."""
    return None if bounds is None else (-bounds[1], -bounds[0])


def ordered(kind: str, of: Callable[[Finding], tuple[float, Interval]], count: int = 3) -> Answer:
    """Return the first lines of a question by some value."""

    def answer(study: Study) -> str:
        found = sorted(study.of(kind), key=lambda each: -of(each)[0])
        return "; ".join(f"{each.name} {signed(*of(each))}" for each in found[:count])

    return answer


def per_parameter(study: Study) -> str:
    """Return projections by what they gain alone per parameter."""
    found = sorted(study.of("one projection alone"), key=lambda each: -each.gain / each.parameters)
    return "; ".join(f"{each.name} {number(100_000 * each.gain / each.parameters, 3, signed=True)}" for each in found)


def every(kind: str) -> Answer:
    """Return all lines of a question."""

    def answer(study: Study) -> str:
        return "; ".join(
            f"{each.name}: {number(each.mean, 3)}{spread(each)}, gain {signed(each.gain, each.gain_interval)}"
            for each in study.of(kind)
        )

    return answer


def spread(each: Finding) -> str:
    """Return the standard deviation over seeds, where there are several."""
    return f" ± {number(statistics.stdev(each.means), 3)}" if len(each.means) > 1 else ""


def gain(each: Finding) -> tuple[float, Interval]:
    """Return a gain and its interval."""
    return each.gain, each.gain_interval


def drop(each: Finding) -> tuple[float, Interval]:
    """Return a drop and its interval."""
    return each.drop, each.drop_interval


QUESTIONS: tuple[tuple[str, str, str, Answer], ...] = (
    ("components", "LoRA on both components", "", whole),
    ("components", "LoRA on the MLP alone", "up to 98 % of the performance with both", trained("mlp")),
    ("components", "the same, with the budget of both", "", trained("mlp", equal=True)),
    ("components", "LoRA on attention alone", "helps more than the MLP (one summary)", trained("attention")),
    ("components", "the same, with the budget of both", "", trained("attention", equal=True)),
    ("components", "MLP − attention at one rank", "the two summaries contradict each other", apart(equal=False)),
    ("components", "MLP − attention at one budget", "", apart(equal=True)),
    ("components", "one component acts of adapters trained with both", "", afterwards),
    ("projections", "largest gains of one projection alone",
     "up and gate far before down; another summary: q and k", ordered("one projection alone", gain, 6)),
    ("projections", "the same per 100,000 parameters", "", per_parameter),
    ("projections", "largest drops without one projection", "", ordered("all but one projection", drop, 6)),
    ("grid", "largest gains of one projection of one layer alone", "", ordered("grid, one alone", gain)),
    ("grid", "largest drops without one projection of one layer", "", ordered("grid, all but one", drop)),
    ("layers", "largest drops without one layer", "layers 5–15 of 32; another summary: middle blocks",
     ordered("all but one layer", drop)),
    ("layers", "largest gains of one layer alone", "", ordered("one layer alone", gain)),
    ("layers", "lowest layers alone", "", every("from the bottom")),
    ("layers", "highest layers alone", "", every("from the top")),
    ("ranks", "ranks", "1, 2, 8 and 32 were compared", every("rank")),
    ("checkpoints", "steps", "a state at step 50 is named", every("step")),
    ("losses", "losses, and how far from the first", "", by_loss),
)  # fmt: skip


def side_by_side(results: Path, method: str) -> str:
    """Return the table of one method: what is said of the paper, and what is found."""
    lines = [["question", "said of the paper", *COLLECTIONS], ["---"] * (2 + len(COLLECTIONS))]
    for part, question, said, answer in QUESTIONS:
        if part == "losses" and method not in COMPARED:
            continue
        cells = []
        for collection in COLLECTIONS:
            found = read(results / f"{collection}-{method}-{part}.json")
            cells.append(MISSING if found is None else answer(found) or MISSING)
        lines.append([question, said, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def scope(results: Path, method: str) -> str:
    """Return what the numbers of a method are of."""
    told = []
    for collection in COLLECTIONS:
        for part in PARTS:
            found = read(results / f"{collection}-{method}-{part}.json")
            if found is not None:
                told.append(
                    f"{part}, {found.collection}: {len(found.queries)} queries × {found.depth} candidates, "
                    f"{len(found.subjects)} adapters"
                )
    return "; ".join(told) + "." if told else f"{MISSING.capitalize()}."


def on_dev(results: Path, cells: list[Cell]) -> list[dict[str, float]]:
    """Return what trainings reached on dev, those that have run."""
    paths = [results / "training" / f"{cell.name}.json" for cell in cells]
    return [json.loads(path.read_text(encoding="utf-8"))["dev"] for path in paths if path.is_file()]


def rates(results: Path) -> str:
    """Return the learning rates that were tried on dev."""
    rows = [
        (method, loss, collection, tried(method, collection, loss))
        for method in LOSSES
        for loss in (None, *other_losses(method))
        for collection in COLLECTIONS
    ]
    columns = sorted({rate for *_, cells in rows for rate in cells})
    lines = [["method", "collection", "model alone", *(f"{rate:g}" for rate in columns)], ["---"] * (3 + len(columns))]
    for method, loss, collection, cells in rows:
        untrained, values = "–", []
        for rate in columns:
            own = cells.get(rate, [])
            reached = [number(dev["trained"], 4) for dev in on_dev(results, own)]
            values.append(", ".join(reached) or (MISSING if own else "–"))
            for dev in on_dev(results, own[:1]):
                untrained = number(dev["zero_shot"], 4)
        lines.append([method if loss is None else f"{method}, {loss}", collection, untrained, *values])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def parts(results: Path) -> dict[str, str]:
    """Return all that is written from results, by the mark that it stands under."""
    found = {"rates": rates(results)}
    for method in LOSSES:
        found |= {f"{method} scope": scope(results, method), method: side_by_side(results, method)}
    return found


def tables(results: Path) -> str:
    """Return the same as a page of its own."""
    return "\n\n".join(f"## {name}\n\n{part}" for name, part in parts(results).items())


def filled(text: str) -> str:
    """Return the text of the page with its marks filled."""
    for name, part in parts(RESULTS).items():
        mark = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not mark.search(text):
            raise SystemExit(f"{DOCS} has no mark {name!r}")
        text = mark.sub(lambda found, part=part: f"{found[1]}{part}\n{found[2]}", text)
    return text


def write() -> None:
    """Fill the page."""
    text = filled(DOCS.read_text(encoding="utf-8"))
    with write_text(DOCS) as file:
        file.write(text)


def check() -> None:
    """End with an error if the page differs from the results, and say where."""
    text = DOCS.read_text(encoding="utf-8")
    changes = list(difflib.unified_diff(text.splitlines(), filled(text).splitlines(), "page", "results", "", "", 0, ""))
    if changes:
        raise SystemExit("\n".join([*changes, f"{DOCS} differs from {RESULTS}: run {Path(__file__).name}"]))


def main() -> None:
    """Fill the page, or check it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail if the page differs from the results")
    parser.add_argument("--again", action="store_true", help="take differences, intervals and pictures anew")
    args = parser.parse_args()
    for path in sorted(RESULTS.glob("*.json")) if args.again else ():
        renew(path)
    check() if args.check else write()


if __name__ == "__main__":
    main()
