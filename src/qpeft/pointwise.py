"""A scorer of single (query, passage) pairs, made into a reranker."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import final

from qpeft.errors import ScoreError
from qpeft.types import UNREADABLE, Candidates, Passage, Query, QueryBatches, Ranking, Reranker, Scorer

AT_ONCE = 4_096
"""Pairs whose tokens are in memory together, so that it does not grow with a query's candidates."""


@final
class Pointwise(Reranker):
    """Scores every candidate alone and sorts.

    A scorer says −∞ of a passage that it cannot read (zero tokens). Such passages come last, one below the lowest
    score of their query, so that they can be written, read and interpolated like any other.

    Args:
        scorer: gives one score per pair.
        batches: queries whose pairs are scored in one call, so that pairs of similar length meet in a batch.
    """

    def __init__(self, scorer: Scorer, batches: QueryBatches | None = None) -> None:
        super().__init__()
        self._scorer = scorer
        self.query_batches = batches or QueryBatches()
        self.counts = scorer.counts
        self.facts = scorer.facts

    def check(self, query: Query) -> None:
        """Raise QueryError for a query that the scorer cannot score."""
        self._scorer.check(query)

    def rerank(self, items: Iterable[Candidates]) -> Iterator[Ranking]:
        """Yield one ranking per item, lazily and in order; see `Reranker.rerank`."""
        for together in self.query_batches.split(items):
            yield from self._rank(together)

    def _rank(self, items: list[Candidates]) -> Iterator[Ranking]:
        pairs = [(item.query, passage) for item in items for passage in item.passages]
        scores = self._scores(pairs)
        for item in items:
            ranking = ranked(item.query.id, [(passage.id, next(scores)) for passage in item.passages])
            self.counts.constant_queries += ranking.constant
            yield ranking

    def _scores(self, pairs: Sequence[tuple[Query, Passage]]) -> Iterator[float]:
        for start in range(0, len(pairs), AT_ONCE):
            yield from self._scorer.score(pairs[start : start + AT_ONCE])


def ranked(query_id: str, scored: Sequence[tuple[str, float]]) -> Ranking:
    """Return the ranking of one query; what has −∞ is unreadable, with one below the lowest score (`UNREADABLE`: all).

    Args:
        query_id: the query's.
        scored: (passage id, score) pairs.

    Raises:
        ScoreError: a score is NaN or +∞.
    """
    for passage_id, score in scored:
        if math.isnan(score) or score == math.inf:
            raise ScoreError(f"query {query_id!r}, passage {passage_id!r}: the model gave the score {score}")
    readable = [score for _, score in scored if score != -math.inf]
    floor = min(readable) - 1.0 if readable else UNREADABLE
    ranking = Ranking.from_scores(query_id, [(passage_id, max(score, floor)) for passage_id, score in scored])
    unreadable = frozenset(passage_id for passage_id, score in scored if score == -math.inf)
    return dataclasses.replace(ranking, unreadable=unreadable) if unreadable else ranking
