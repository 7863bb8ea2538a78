"""A comparison of runs as one HTML file: no network, no scripts, readable on light and dark and on paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qpeft.analysis.examples import won_and_lost
from qpeft.analysis.pages import render
from qpeft.analysis.plots import SERIES, cutoff_curves, difference_bars
from qpeft.data.files import StrPath, write_text
from qpeft.errors import OptionError
from qpeft.evaluation.cost import Cost
from qpeft.evaluation.measures import Evaluation, evaluate, least_relevant
from qpeft.evaluation.significance import Comparison, Test, bootstrap_interval, per_query_differences
from qpeft.evaluation.tables import comparison_table, cost_table, interval, measure_notes, measure_table, number
from qpeft.types import Passage, Qrels, Query, Run

CURVE_CUTOFFS = tuple(range(5, 51, 5))
"""k of the curves: the protocol of the Q-PEFT paper (arXiv 2404.04522)."""
OF_CANDIDATES, OF_RUNS = ("CandR", "CandHit"), ("R", "Success")
"""What is drawn over cutoffs where all runs order the same candidates, and where they do not."""


def write_comparison_report(
    path: StrPath,
    evaluations: Sequence[Evaluation],
    comparisons: Sequence[Comparison],
    runs: Sequence[Run],
    qrels: Qrels,
    queries: Mapping[str, Query] | None = None,
    passages: Mapping[str, Passage] | None = None,
    provenance: Mapping[str, object] | None = None,
    *,
    costs: Mapping[str, Cost] | None = None,
    test: Test = "t",
    alpha: float = 0.05,
    title: str = "Comparison of runs",
) -> None:
    """Write the report; a file that stands there is replaced only once the new one is complete.

    Args:
        path: where to write.
        evaluations: one per run; figures and examples are about the first measure of the first one.
        comparisons: from `compare` or `compare_all_pairs`; figures and examples show those with the first baseline.
        runs: the runs evaluated, found by their tags.
        qrels: the judgements they were evaluated with.
        queries: texts by query id, for the examples.
        passages: texts by passage id; only the passages shown are asked for.
        provenance: what to record about how the runs came to be; values are shown as they are or as JSON.
        costs: by tag of the run.
        test: whose p-values to show and to mark by.
        alpha: level of the marks.
        title: heading of the page.

    Raises:
        OptionError: no evaluation, or an evaluation or comparison about a run that is not given.
        InputError: the file cannot be written.
    """
    _check(evaluations, comparisons, runs)
    by_tag = {run.tag: run for run in runs}
    context: dict[str, Any] = {
        "title": title,
        "queries": len(evaluations[0].queries),
        "measure": evaluations[0].measures[0],
        "baseline": comparisons[0].baseline if comparisons else None,
        "summary": _summary(evaluations, comparisons, test, alpha),
        "notes": measure_notes(evaluations, comparisons, test, alpha),
        "costs": cost_table(evaluations, costs) if costs else None,
        "differences": comparison_table(comparisons, test=test, alpha=alpha) if comparisons else None,
        "curves": _curves([by_tag[each.run] for each in evaluations], qrels, evaluations[0].measures[0]),
        "series": [(each.run, *SERIES[index % len(SERIES)]) for index, each in enumerate(evaluations)],
        "pairs": _pairs(evaluations, comparisons, by_tag, qrels, queries, passages),
        "made": provenance or {},
    }
    page = render("report.html", context, number=number)
    with write_text(path) as file:
        file.write(page)


def _check(evaluations: Sequence[Evaluation], comparisons: Sequence[Comparison], runs: Sequence[Run]) -> None:
    if not evaluations:
        raise OptionError("a report needs at least one evaluation")
    tags = {run.tag for run in runs}
    for each in evaluations:
        if each.run not in tags:
            raise OptionError(f"run {each.run!r} is evaluated but not given")
    evaluated = {each.run for each in evaluations}
    for comparison in comparisons:
        for tag in (comparison.baseline, comparison.run):
            if tag not in evaluated:
                raise OptionError(f"run {tag!r} is compared but its evaluation is not given")


def _summary(
    evaluations: Sequence[Evaluation], comparisons: Sequence[Comparison], test: Test, alpha: float
) -> dict[str, Any]:
    table = measure_table(evaluations, comparisons, test=test, alpha=alpha)
    intervals = [
        [
            bootstrap_interval(np.array(list(each.per_query.get(measure, {}).values()), dtype=np.float64))
            for measure in table.header[1:]
        ]
        for each in evaluations
    ]
    return {
        "header": table.header,
        "rows": [
            (row[0].text, list(zip(row[1:], [interval(bounds, 3) for bounds in of_run], strict=True)))
            for row, of_run in zip(table.rows, intervals, strict=True)
        ],
    }


def _curves(runs: Sequence[Run], qrels: Qrels, measure: str) -> dict[str, Any] | None:
    depth = min(max((len(ranking.hits) for ranking in run.values()), default=0) for run in runs)
    cutoffs = [k for k in CURVE_CUTOFFS if k <= depth]
    if len(cutoffs) < 2:
        return None
    same = _same_candidates(runs, qrels)
    least = least_relevant(measure)
    names = [name + (f"(rel={least})" if least > 1 else "") for name in (OF_CANDIDATES if same else OF_RUNS)]
    means = {run.tag: evaluate(run, qrels, [f"{name}@{k}" for name in names for k in cutoffs]).means for run in runs}
    panels = {name: {tag: [of_run[f"{name}@{k}"] for k in cutoffs] for tag, of_run in means.items()} for name in names}
    return {
        "svg": cutoff_curves(panels, cutoffs, "curves"),
        "same_candidates": same,
        "panels": panels,
        "cutoffs": cutoffs,
    }


def _same_candidates(runs: Sequence[Run], qrels: Qrels) -> bool:
    """Recall over the candidates compares orders of the same candidates, and is misleading otherwise."""

    def candidates(run: Run, query_id: str) -> set[str]:
        return {hit.passage_id for hit in run[query_id].hits} if query_id in run else set()

    return all(candidates(run, query_id) == candidates(runs[0], query_id) for query_id in qrels for run in runs[1:])


def _pairs(
    evaluations: Sequence[Evaluation],
    comparisons: Sequence[Comparison],
    runs: Mapping[str, Run],
    qrels: Qrels,
    queries: Mapping[str, Query] | None,
    passages: Mapping[str, Passage] | None,
) -> list[dict[str, Any]]:
    by_tag = {each.run: each for each in evaluations}
    measure = evaluations[0].measures[0]
    shown = [each for each in comparisons if each.measure == measure and each.baseline == comparisons[0].baseline]
    pairs = []
    for index, each in enumerate(shown):
        both = by_tag[each.baseline], by_tag[each.run]
        both_runs = runs[each.baseline], runs[each.run]
        won, lost = won_and_lost(both, both_runs, qrels, measure, queries=queries, passages=passages)
        bars = difference_bars(list(per_query_differences(*both, measure).values()), measure, f"bars{index}")
        pairs.append({"comparison": each, "bars": bars, "won": won, "lost": lost})
    return pairs
