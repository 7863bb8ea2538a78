"""Test runs against a baseline: paired tests with Holm's correction, wins and losses, and a report as a web page."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from qpeft.commands._judgements import Judging, Shown, judgements, read_costs, read_runs
from qpeft.commands._output import check_output
from qpeft.data.collection import identity
from qpeft.evaluation.measures import evaluate
from qpeft.evaluation.significance import Test, compare, compare_all_pairs
from qpeft.evaluation.table_formats import render
from qpeft.provenance import input_fingerprint, options_of, provenance


@dataclass(frozen=True)
class Config:
    """Comparison."""

    baseline: str
    """The run to beat."""
    run: tuple[str, ...]
    """A run to compare with it; may be given several times."""
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


def run(judging: Judging, config: Config, shown: Shown) -> None:
    """Compare, print tables, and write the report where asked to."""
    paths = (config.baseline, *config.run)
    if config.html is not None:
        check_output(config.html, read=paths, option="--html")
    runs = read_runs(paths)
    costs = read_costs(runs, paths) if shown.cost or config.html else {}
    collection, qrels = judgements(judging.collection, judging.split, judging.labels, runs)
    evaluations = [evaluate(each, qrels, judging.measures) for each in runs]
    if config.all_pairs:
        comparisons = compare_all_pairs(evaluations, seed=config.seed)
    else:
        comparisons = compare(evaluations[0], evaluations[1:], seed=config.seed)
    print(
        render(
            evaluations,
            comparisons,
            format=shown.format,
            test=config.test,
            alpha=config.alpha,
            digits=shown.digits,
            costs=costs if shown.cost else None,
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
        collection.queries(judging.split),
        collection.passages,
        provenance(
            collection=identity(collection, judging.split),
            options=options_of(judging, config, shown),
            runs={each.tag: input_fingerprint(path) for each, path in zip(runs, paths, strict=True)},
        ),
        costs=costs,
        test=config.test,
        alpha=config.alpha,
        title=f"{collection.name} · {judging.split}",
    )
    print(f"report: {config.html}", file=sys.stderr)
