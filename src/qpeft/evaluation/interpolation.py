"""Interpolation of a reranker with its first stage: lexical and model evidence together.

Per query, over the passages that both rank, with z the scores standardised to mean 0 and standard deviation 1
(all 0 if the scores are equal):

    score(p) = (1 − w) · z_reranked(p) + w · z_first(p)

so w = 0 is the reranker's order and w = 1 the first stage's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qpeft.errors import OptionError, ScoreError, at_least
from qpeft.evaluation.measures import evaluate
from qpeft.types import Qrels, Ranking, Run

DEFAULT_WEIGHTS = tuple(step / 20 for step in range(21))
"""0, 0.05 … 1."""


@dataclass(frozen=True, slots=True)
class WeightChoice:
    """The weight that `choose_weight` found, and what it saw: (weight, mean of the measure) pairs."""

    weight: float
    measure: str
    curve: tuple[tuple[float, float], ...]


def interpolate(first: Run, reranked: Run, weight: float, *, depth: int | None = None, tag: str | None = None) -> Run:
    """Mix two runs' standardised scores.

    Args:
        first: the first stage; queries that only it ranks keep its ranking.
        reranked: ranks passages of `first` only, all or the upper part.
        weight: share of the first stage, in [0, 1].
        depth: reranking depth. Needed where `reranked` carries the passages below it along: only the first `depth`
            passages of `first` are mixed. The rest keep the order of `first`, below the mixed ones.
        tag: of the result; by default made of both tags and the weight.

    Raises:
        OptionError: a weight or depth out of range.
        ScoreError: `reranked` has a query or passage that `first` does not have.
    """
    if not 0 <= weight <= 1:
        raise OptionError(f"weight is {weight}; it must be between 0 and 1")
    at_least(1, depth=depth)
    unknown = next((query_id for query_id in reranked if query_id not in first), None)
    if unknown is not None:
        raise ScoreError(f"query {unknown!r} of run {reranked.tag!r} is not in the first-stage run {first.tag!r}")
    return Run(
        (
            _mixed(ranking, reranked[query_id], weight, depth) if query_id in reranked else ranking
            for query_id, ranking in first.items()
        ),
        tag or f"{reranked.tag}+{weight:g}*{first.tag}",
    )


def choose_weight(
    first: Run,
    reranked: Run,
    qrels: Qrels,
    measure: str,
    weights: Sequence[float] = DEFAULT_WEIGHTS,
    *,
    depth: int | None = None,
) -> WeightChoice:
    """Return the weight with the best mean of one measure; the smaller weight where two are equal.

    Use it on dev queries only, and then `interpolate` the test runs with what it chose.

    Raises:
        OptionError: no weight, not exactly one measure, or a measure that has no value on these queries.
        ScoreError: see `interpolate`.
    """
    if not len(weights):
        raise OptionError("no weight is given to choose from")
    curve: list[tuple[float, float]] = []
    for weight in sorted(map(float, weights)):
        means = evaluate(interpolate(first, reranked, weight, depth=depth), qrels, measure).means
        if len(means) != 1:
            raise OptionError(f"the weight is chosen by one measure, not by {len(means)}: {measure}")
        (mean,) = means.values()
        if mean is None:
            raise OptionError(f"measure {measure!r} has no value on these queries")
        curve.append((weight, mean))
    best = max(mean for _, mean in curve)
    # means are sums over queries: what differs by rounding only is equal
    chosen = next(weight for weight, mean in curve if mean >= best - 1e-12)
    return WeightChoice(chosen, measure, tuple(curve))


def _mixed(first: Ranking, reranked: Ranking, weight: float, depth: int | None) -> Ranking:
    upper = {hit.passage_id: hit.score for hit in first.hits[:depth]}
    in_first = {hit.passage_id for hit in first.hits}
    for hit in reranked.hits:
        if hit.passage_id not in in_first:
            raise ScoreError(f"query {first.query_id!r}: passage {hit.passage_id!r} is not in the first-stage run")
    both = [hit for hit in reranked.hits if hit.passage_id in upper]
    mixed = (1 - weight) * _standardised([hit.score for hit in both]) + weight * _standardised(
        [upper[hit.passage_id] for hit in both]
    )
    scores = [(hit.passage_id, float(score)) for hit, score in zip(both, mixed, strict=True)]
    done = {hit.passage_id for hit in both}
    rest = [hit.passage_id for hit in first.hits if hit.passage_id not in done]
    return Ranking.from_scores(first.query_id, scores).followed_by(rest)


def _standardised(scores: Sequence[float]) -> npt.NDArray[np.float64]:
    values = np.asarray(scores, dtype=np.float64)
    if not values.size or np.ptp(values) == 0:
        return np.zeros_like(values)
    standardised: npt.NDArray[np.float64] = (values - values.mean()) / values.std()
    return standardised
