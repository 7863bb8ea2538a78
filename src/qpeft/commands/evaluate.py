"""Measure runs against the judgements of a split.

Measures are written as in ir_measures (nDCG@10, RR@10, R@100, Success@10 …). Besides, CandR@k and CandHit@k are recall
and hit rate among the candidates, as in the Q-PEFT paper's tables; with _clean (CandR_clean@10), queries without a
relevant candidate are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from qpeft.commands._judgements import Labels, judgements, read_costs, read_runs
from qpeft.commands._output import check_output
from qpeft.data.records import write_json_lines
from qpeft.evaluation.measures import evaluate
from qpeft.evaluation.table_formats import Format, render

DEFAULT_MEASURES = "nDCG@10 RR@10 R@10"


@dataclass(frozen=True)
class Config:
    """Evaluation."""

    collection: str
    """A BEIR folder, mini (embedded), or ir_datasets:ID."""
    run: tuple[str, ...]
    """A run file; may be given several times."""
    split: str = "test"
    """Whose judgements."""
    measures: str = DEFAULT_MEASURES
    """Separated by spaces."""
    labels: Labels = "qrels"
    """Judge by the collection's qrels, or by whether a passage contains an answer string (DPR's rule); of passages,
    those of all given runs are judged: recall and nDCG depend on all of them, RR, Success, CandR and CandHit do not."""
    per_query: str | None = None
    """Also write every query's values to this JSON Lines file."""
    format: Format = "text"
    """How the table is printed."""
    digits: int = 4
    """Decimals."""
    cost: bool = False
    """Also show what the runs cost, where the provenance beside them says so; RPP is that of the first measure."""


def run(config: Config) -> None:
    """Evaluate and print a table."""
    if config.per_query is not None:
        check_output(config.per_query, read=config.run, option="--per-query")
    runs = read_runs(config.run)
    _, qrels = judgements(config.collection, config.split, config.labels, runs)
    evaluations = [evaluate(each, qrels, config.measures) for each in runs]
    if config.per_query is not None:
        lines = (
            {"run": each.run, "query": query, "measure": measure, "value": value}
            for each in evaluations
            for measure, values in each.per_query.items()
            for query, value in values.items()
        )
        write_json_lines(lines, config.per_query)
    costs = read_costs(runs, config.run) if config.cost else None
    print(render(evaluations, format=config.format, digits=config.digits, costs=costs))
