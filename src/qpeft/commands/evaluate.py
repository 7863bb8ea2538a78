"""Measure runs against the judgements of a split.

Measures are written as in ir_measures (nDCG@10, RR@10, R@100, Success@10 …). Besides, CandR@k and CandHit@k are recall
and hit rate among the candidates, as in the Q-PEFT paper's tables; with _clean (CandR_clean@10), queries without a
relevant candidate are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from qpeft.commands._judgements import Judging, Shown, judgements, read_costs, read_runs
from qpeft.commands._output import check_output
from qpeft.data.records import write_json_lines
from qpeft.evaluation.measures import evaluate
from qpeft.evaluation.table_formats import render


@dataclass(frozen=True)
class Config:
    """Evaluation."""

    run: tuple[str, ...]
    """A run file; may be given several times."""
    per_query: str | None = None
    """Also write every query's values to this JSON Lines file."""


def run(judging: Judging, config: Config, shown: Shown) -> None:
    """Evaluate and print a table."""
    if config.per_query is not None:
        check_output(config.per_query, read=config.run, option="--per-query")
    runs = read_runs(config.run)
    _, qrels = judgements(judging.collection, judging.split, judging.labels, runs)
    evaluations = [evaluate(each, qrels, judging.measures) for each in runs]
    if config.per_query is not None:
        lines = (
            {"run": each.run, "query": query, "measure": measure, "value": value}
            for each in evaluations
            for measure, values in each.per_query.items()
            for query, value in values.items()
        )
        write_json_lines(lines, config.per_query)
    costs = read_costs(runs, config.run) if shown.cost else None
    print(render(evaluations, format=shown.format, digits=shown.digits, costs=costs))
