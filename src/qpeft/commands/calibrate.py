"""Map scores to the probability that a passage is relevant, fitted on the judged candidates of a dev run.

--run is a run made by `qpeft rerank --split dev`; its provenance, beside it, says which model, template and adapter the
scores are of. The calibration goes into the adapter's folder (--adapter), or to a file of its own (--output, for
`qpeft serve --calibration`). No ranking changes: both methods are non-decreasing.

What is printed was measured by cross-validation over queries. Brier: mean squared error; skill: the share of the base
rate's error that is gone; ECE: mean gap between promised and found, over ten bins of equally many pairs.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from qpeft import methods
from qpeft.commands._output import check_output
from qpeft.commands._run_provenance import read_run_provenance, scored_depth
from qpeft.data.collection import identity, open_collection
from qpeft.data.trec import read_run
from qpeft.errors import AdapterError, InputError, OptionError, ScoreError
from qpeft.evaluation.calibration import (
    THRESHOLDS,
    Groups,
    JudgedPairs,
    Kept,
    Method,
    Values,
    brier,
    expected_calibration_error,
    fit,
    folds,
    judged_pairs,
    keep,
    out_of_fold,
    separation,
)
from qpeft.evaluation.calibration_file import FILE, Calibration, ScoreOrigin, write_calibration
from qpeft.evaluation.table_formats import text_table
from qpeft.evaluation.tables import Cell, Table, interval, number
from qpeft.provenance import file_fingerprint, input_fingerprint, provenance, provenance_path, write_provenance

BASE_RATE = "base rate"


@dataclass(frozen=True)
class Config:
    """Calibration."""

    collection: str
    """A BEIR folder, mini (embedded), or ir_datasets:ID."""
    run: str
    """The run whose scores are calibrated."""
    split: str = "dev"
    """Whose judgements."""
    method: Method = "platt"
    """platt: a logistic curve; isotonic: steps, which need more data."""
    centre: bool = False
    """Subtract the mean over a query's candidates first: queries compare, but probabilities depend on the company."""
    adapter: str | None = None
    """Folder of the adapter that the run was made with; the calibration is put into it."""
    output: str | None = None
    """The calibration file to write instead."""
    folds: int = 5
    """Of the cross-validation."""
    seed: int = 0
    """Of the folds."""
    plot: str | None = None
    """Write a reliability diagram to this PNG file."""


def run(config: Config) -> None:
    """Fit, validate, write, and print what it is worth."""
    if (config.adapter is None) == (config.output is None):
        raise OptionError("give either --adapter or --output")
    if config.output is not None:
        check_output(config.output, read=[config.run])
    if config.plot is not None:
        check_output(config.plot, read=[config.run], option="--plot")
    facts = _provenance(config.run)
    depth = scored_depth(config.run, facts)
    collection = open_collection(config.collection)
    made_of, judged = facts.get("collection") or {}, identity(collection, config.split)
    if made_of.get("fingerprint", judged["fingerprint"]) != judged["fingerprint"]:
        raise InputError(
            f"{config.run} was made from collection {made_of.get('name')!r}, which is not {collection.name!r}"
        )
    origin = _origin(facts)
    output = Path(config.output) if config.output is not None else _in_adapter(config, origin)
    pairs = judged_pairs(read_run(config.run), collection.qrels(config.split), depth, collection.passages)
    used = pairs.centred() if config.centre else pairs
    fitted = fit(config.method, used.scores, used.relevant)
    if fitted.constant:
        raise ScoreError(f"{config.run}: relevant passages score no higher than others, so scores say nothing of them")
    fold = folds(pairs, config.folds, config.seed)
    predicted = _predicted(pairs, fold)
    chosen = predicted[_name(config.method, config.centre)]
    kept = [keep(threshold, chosen, pairs, fold) for threshold in THRESHOLDS]
    on = _fitted_on(config, facts, judged, pairs)
    validation = _validation(config, pairs, predicted, kept)
    calibration = Calibration(fitted, origin, config.centre, on, validation)
    print(_report(calibration, kept))
    write_calibration(calibration, output)
    if config.output is not None:
        options = dataclasses.asdict(config)
        write_provenance(output, provenance(command="calibrate", options=options, fitted_on=calibration.fitted_on))
    print(f"calibration: {output}", file=sys.stderr)
    if config.plot is not None:
        from qpeft.analysis.plots import reliability_diagram

        reliability_diagram(chosen, pairs.relevant, Path(config.plot))
        print(f"plot: {config.plot}", file=sys.stderr)


def _provenance(run: str) -> dict[str, Any]:
    facts = read_run_provenance(run)
    if facts is None and Path(run).exists():
        beside = provenance_path(Path(run))
        raise InputError(f"{beside} is missing: without it, nobody knows what the scores of {run} are of")
    return facts or {"options": {}}


def _origin(facts: Mapping[str, Any]) -> ScoreOrigin | None:
    """Return what model the scores are of; None where they are mixed, or no language model's."""
    options = facts["options"]
    if facts.get("command") != "rerank" or options.get("interpolate") is not None:
        return None
    known = {each.name for each in dataclasses.fields(methods.load(options["method"]).Config)}
    of_method = {name: value for name, value in options.items() if name in known}
    return ScoreOrigin.of(facts["model"], facts, options["method"], of_method)


def _in_adapter(config: Config, origin: ScoreOrigin | None) -> Path:
    """Return the place in the adapter's folder, once it is sure that the run's scores are this adapter's."""
    from qpeft.adapters._folder import WEIGHTS, adapter_path, embedded_adapters, read_config

    assert config.adapter is not None
    if config.adapter in embedded_adapters():
        raise OptionError(f"--adapter {config.adapter} is embedded in qpeft, which is not written to: copy its folder")
    folder = adapter_path(config.adapter)
    described = read_config(folder)
    if not (folder / WEIGHTS).is_file():
        raise AdapterError(f"no adapter in {config.adapter!r}: {WEIGHTS} is missing")
    own = {"name": described["adapter"], "sha256": file_fingerprint(folder / WEIGHTS)}
    made_with = origin.adapter if origin else None
    if made_with is None or made_with["sha256"] != own["sha256"]:
        what = f"{made_with['name']!r} ({made_with['sha256']:.12})" if made_with else "no adapter alone"
        mine = f"{own['name']!r} ({own['sha256']:.12})"
        raise OptionError(f"--adapter {config.adapter} is {mine}, but {config.run} was made with {what}")
    return folder / FILE


def _name(method: str, centred: bool) -> str:
    return method + ", centred" * centred


def _predicted(pairs: JudgedPairs, fold: Groups) -> dict[str, Values]:
    """Return what each way to calibrate says of pairs that it was not fitted on."""
    found = {BASE_RATE: out_of_fold(None, pairs, fold)}
    for centred, some in ((False, pairs), (True, pairs.centred())):
        found |= {_name(method, centred): out_of_fold(method, some, fold) for method in get_args(Method)}
    return found


def _fitted_on(
    config: Config, facts: Mapping[str, Any], collection: Mapping[str, str], pairs: JudgedPairs
) -> dict[str, Any]:
    return {
        "command": facts.get("command"),
        "collection": collection,
        "run": input_fingerprint(config.run),
        "queries": pairs.queries,
        "queries_with_relevant": pairs.answerable,
        "pairs": len(pairs.scores),
        "relevant": int(pairs.relevant.sum()),
    }


def _validation(
    config: Config, pairs: JudgedPairs, predicted: Mapping[str, Values], kept: list[Kept]
) -> dict[str, Any]:
    within, across = separation(pairs)
    _, centred = separation(pairs.centred())
    return {
        "folds": config.folds,
        "seed": config.seed,
        "separation": {"within_queries": within, "across_queries": across, "across_queries_centred": centred},
        "quality": {
            name: {
                "brier": brier(values, pairs.relevant),
                "ece": expected_calibration_error(values, pairs.relevant),
            }
            for name, values in predicted.items()
        },
        "thresholds": [dataclasses.asdict(each) for each in kept],
    }


def _report(calibration: Calibration, kept: list[Kept]) -> str:
    """Return the two tables: what the methods are worth, and how thresholds of the chosen one carry over."""
    found, on = calibration.validation, calibration.fitted_on
    base = found["quality"][BASE_RATE]["brier"]
    written = _name(calibration.method, calibration.centred)
    rows = tuple(
        (
            Cell(name + (" (written)" if name == written else "")),
            Cell(number(values["brier"], 4)),
            Cell(number(1 - values["brier"] / base, 3, signed=True)),
            Cell(number(values["ece"], 4)),
        )
        for name, values in found["quality"].items()
    )
    within, across, centred = found["separation"].values()
    notes = [
        f"{found['folds']}-fold cross-validation over {on['queries']:,} queries, {on['queries_with_relevant']:,} of "
        f"them with a relevant candidate: {on['pairs']:,} pairs, {on['relevant']:,} relevant",
        f"a relevant passage scores above another one in {within:.1%} of cases within a query, in {across:.1%} across "
        f"queries, in {centred:.1%} once centred",
    ]
    if found["quality"][written]["brier"] >= base:
        notes.append(f"warning: {written} is no better than the base rate on queries that it was not fitted on")
    quality = text_table(Table(("calibration", "Brier", "skill", "ECE"), rows, tuple(notes)))
    return quality + "\n" + text_table(_thresholds(kept))


def _thresholds(kept: list[Kept]) -> Table:
    rows = tuple(
        (
            Cell(f"P ≥ {each.threshold:g}"),
            Cell(number(each.per_query, 2)),
            Cell(number(each.promised, 3)),
            Cell(number(each.precision, 3)),
            Cell(interval(each.range, 3)),
            Cell(number(each.recall, 3)),
        )
        for each in kept
    )
    header = ("threshold", "kept per query", "promised", "relevant", "lowest … highest fold", "recall")
    note = "of the pairs kept: their mean probability, and the share of them that is relevant; queries not fitted on"
    return Table(header, rows, (note,))
