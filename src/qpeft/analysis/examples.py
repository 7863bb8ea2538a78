"""The queries on which two runs differ most, with what stands at the top of each ranking."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qpeft.evaluation.measures import Evaluation, least_relevant
from qpeft.evaluation.significance import per_query_differences
from qpeft.types import Passage, Qrels, Query, Ranking, Run

_SHOWN = 3  # passages of each ranking


@dataclass(frozen=True, slots=True)
class ShownPassage:
    """A ranked passage to look at; title and text are empty where the texts are not known."""

    rank: int
    id: str
    score: float
    grade: int
    relevant: bool
    title: str = ""
    text: str = ""


@dataclass(frozen=True, slots=True)
class Top:
    """The top of one ranking; `first_relevant` is the rank (from 1) of its first relevant passage, if it has one."""

    run: str
    value: float
    first_relevant: int | None
    passages: tuple[ShownPassage, ...]


@dataclass(frozen=True, slots=True)
class Example:
    """A query and what both runs make of it; `difference` is the run's value − the baseline's."""

    query: Query
    difference: float
    baseline: Top
    run: Top


def won_and_lost(
    evaluations: tuple[Evaluation, Evaluation],
    runs: tuple[Run, Run],
    qrels: Qrels,
    measure: str,
    *,
    queries: Mapping[str, Query] | None = None,
    passages: Mapping[str, Passage] | None = None,
    count: int = 5,
) -> tuple[list[Example], list[Example]]:
    """Return the queries that a run wins, and loses, most clearly against a baseline; largest difference first.

    Args:
        evaluations: of the baseline and of the run.
        runs: the same two.
        qrels: the judgements, for the grades of what is shown.
        measure: notation of the measure to compare by.
        queries: texts by query id; without them the id stands for the text.
        passages: texts by passage id; read only for what is shown.
        count: at most so many of each.
    """
    differences = per_query_differences(*evaluations, measure)
    ordered = sorted(differences, key=lambda query_id: -differences[query_id])
    won = [query_id for query_id in ordered if differences[query_id] > 0][:count]
    lost = [query_id for query_id in reversed(ordered) if differences[query_id] < 0][:count]

    def example(query_id: str) -> Example:
        baseline, other = (
            _top(evaluation, run, query_id, measure, qrels[query_id], passages or {})
            for evaluation, run in zip(evaluations, runs, strict=True)
        )
        query = (queries or {}).get(query_id, Query(query_id, query_id))
        return Example(query, differences[query_id], baseline, other)

    return [example(query_id) for query_id in won], [example(query_id) for query_id in lost]


def _top(
    evaluation: Evaluation,
    run: Run,
    query_id: str,
    measure: str,
    grades: Mapping[str, int],
    passages: Mapping[str, Passage],
) -> Top:
    hits = run.get(query_id, Ranking(query_id, ())).hits
    least = least_relevant(measure)
    relevant = (rank for rank, hit in enumerate(hits, start=1) if grades.get(hit.passage_id, 0) >= least)
    shown = []
    for rank, hit in enumerate(hits[:_SHOWN], start=1):
        passage = passages.get(hit.passage_id, Passage(hit.passage_id, ""))
        grade = grades.get(hit.passage_id, 0)
        text = passage.title, passage.text
        shown.append(ShownPassage(rank, hit.passage_id, hit.score, grade, grade >= least, *text))
    return Top(run.tag, evaluation.per_query[measure][query_id], next(relevant, None), tuple(shown))
