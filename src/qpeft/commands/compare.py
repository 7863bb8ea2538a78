"""Test runs against a baseline: paired tests with Holm's correction, wins and losses, and a report as a web page."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass

from qpeft.commands._judgements import Labels, judgements, read_costs, read_runs
from qpeft.commands._output import check_output
from qpeft.commands.evaluate import DEFAULT_MEASURES
from qpeft.data.collection import identity
from qpeft.evaluation.measures import evaluate
from qpeft.evaluation.significance import Test, compare, compare_all_pairs
from qpeft.evaluation.table_formats import Format, render
from qpeft.provenance import input_fingerprint, provenance


@dataclass(frozen=True)
class Config:
    """Comparison."""

    collection: str
    """A BEIR folder, mini (embedded), or ir_datasets:ID."""
    baseline: str
    """The run to beat."""
    run: tuple[str, ...]
    """A run to compare with it; may be given several times."""
    split: str = "test"
    """Whose judgements."""
    measures: str = DEFAULT_MEASURES
    """Separated by spaces, as for evaluate; the first one is drawn in the report."""
    labels: Labels = "qrels"
    """Judge by the collection's qrels, or by whether a passage contains an answer string (DPR's rule); of passages,
    those of all given runs are judged: recall and nDCG depend on all of them, RR, Success, CandR and CandHit do not."""
    test: Test = "t"
    """Whose p-values mark the table; the JSON format and the report hold all."""
    alpha: float = 0.05
    """Level of the marks."""
    all_pairs: bool = False
    """Compare every run with every other, and correct for that."""
    seed: int = 0
    """Of the permutation test and the bootstrap."""
    html: str | None = None
    """Write the report to this file."""
    format: Format = "text"
    """How the table is printed."""
    digits: int = 4
    """Decimals."""
    cost: bool = False
    """Also show what the runs cost, where the provenance beside them says so; RPP is that of the first measure."""


def run(config: Config) -> None:
    """Compare, print tables, and write the report where asked to."""
    paths = (config.baseline, *config.run)
    if config.html is not None:
        check_output(config.html, read=paths, option="--html")
    runs = read_runs(paths)
    costs = read_costs(runs, paths) if config.cost or config.html else {}
    collection, qrels = judgements(config.collection, config.split, config.labels, runs)
    evaluations = [evaluate(each, qrels, config.measures) for each in runs]
    if config.all_pairs:
        comparisons = compare_all_pairs(evaluations, seed=config.seed)
    else:
        comparisons = compare(evaluations[0], evaluations[1:], seed=config.seed)
    print(
        render(
            evaluations,
            comparisons,
            format=config.format,
            test=config.test,
            alpha=config.alpha,
            digits=config.digits,
            costs=costs if config.cost else None,
        )
    )
    if config.html is None:
        return
    from qpeft.analysis.report import write_comparison_report

    write_comparison_report(
        config.html,
        evaluations,
        comparisons,
        runs,
        qrels,
        collection.queries(config.split),
        collection.passages,
        provenance(
            collection=identity(collection, config.split),
            options=dataclasses.asdict(config),
            runs={each.tag: input_fingerprint(path) for each, path in zip(runs, paths, strict=True)},
        ),
        costs=costs,
        test=config.test,
        alpha=config.alpha,
        title=f"{collection.name} · {config.split}",
    )
    print(f"report: {config.html}", file=sys.stderr)
