"""From a run to the candidates that are to be reranked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from qpeft.errors import UnknownIdError, at_least, nearest
from qpeft.types import Candidates, Passage, Query, Ranking, Run

_SMALL = 50  # from this many ids on, listing them in a message helps nobody


def candidates_from_run(
    run: Run, queries: Mapping[str, Query], passages: Mapping[str, Passage], depth: int | None = None
) -> Iterator[Candidates]:
    """Yield the candidates of each query of a run, in its order, with the run's scores.

    Passages are looked up when their query's turn comes.

    Args:
        run: the first stage's rankings.
        queries: must have every query of the run.
        passages: must have the passages down to `depth`.
        depth: passages below it are not included; all are by default.

    Raises:
        OptionError: the depth is less than 1.
        UnknownIdError: a query or passage of the run is unknown.
    """
    at_least(1, depth=depth)
    return (_candidates(run.tag, ranking, queries, passages, depth) for ranking in run.values())


def check_run(
    run: Run, queries: Mapping[str, Query], passages: Mapping[str, Passage], depth: int | None = None
) -> None:
    """Look up all ids of a run down to `depth`, so that an unknown one shows before the work, not in its midst.

    Raises:
        OptionError: the depth is less than 1.
        UnknownIdError: a query or passage of the run is unknown.
    """
    for _ in candidates_from_run(run, queries, passages, depth):
        pass


def _candidates(
    tag: str, ranking: Ranking, queries: Mapping[str, Query], passages: Mapping[str, Passage], depth: int | None
) -> Candidates:
    hits = ranking.hits[:depth]
    query = queries.get(ranking.query_id)
    if query is None:
        raise UnknownIdError(f"run {tag!r}: query {ranking.query_id!r} is unknown{_hint(ranking.query_id, queries)}")
    found = []
    for hit in hits:
        passage = passages.get(hit.passage_id)
        if passage is None:
            raise UnknownIdError(
                f"run {tag!r}, query {query.id!r}: passage {hit.passage_id!r} is not in the collection"
                f"{_hint(hit.passage_id, passages)}"
            )
        found.append(passage)
    return Candidates(query, tuple(found), tuple(hit.score for hit in hits))


def _hint(unknown: str, known: Mapping[str, object]) -> str:
    return nearest(unknown, known) if len(known) <= _SMALL else ""
