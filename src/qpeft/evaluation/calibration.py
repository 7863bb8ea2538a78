"""Calibration: from scores to the probability that a passage is relevant, fitted on judged candidates.

Both maps are non-decreasing, so that no ranking changes:

* `platt`: P = 1 / (1 + exp(−(slope · score + intercept))), slope ≥ 0, by maximum likelihood with Platt's smoothed
  labels (n₊ + 1)/(n₊ + 2) and 1/(n₋ + 2) (Platt 1999, "Probabilistic outputs for support vector machines").
* `isotonic`: the non-decreasing step function nearest to the labels (pool adjacent violators; Zadrozny and Elkan 2002),
  linear between its steps. Where it is flat, different scores get one probability: rank by score, show probabilities.

A query's likelihood depends on the query more than on the passage, so scores of different queries compare badly.
Centred ones, with the mean over the query's candidates subtracted, compare better; but a probability then depends on
the other candidates.

What a calibration is worth is measured on queries that it was not fitted on. A query's pairs stay together, because
their scores have the query in common.

Shapes: `N` pairs of a query and a candidate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from qpeft.errors import OptionError, ScoreError, UnknownIdError, at_least, nearest
from qpeft.types import Passage, Qrels, Run

Method = Literal["platt", "isotonic"]
Values = npt.NDArray[np.float64]
Labels = npt.NDArray[np.bool_]
Groups = npt.NDArray[np.int64]

THRESHOLDS = (0.1, 0.25, 0.5, 0.75, 0.9)
"""The probabilities that `keep` is tried with."""
_BINS = 10


@dataclass(frozen=True, slots=True)
class Platt:
    """A logistic curve."""

    slope: float
    intercept: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.slope) and math.isfinite(self.intercept)) or self.slope < 0:
            raise ScoreError(f"slope {self.slope} and intercept {self.intercept} make no calibration")

    def __call__(self, scores: npt.ArrayLike) -> Values:
        """Return the probability of each score, `[N] → [N]`.

        Raises:
            ScoreError: a score is NaN or infinite.
        """
        from scipy.special import expit

        values: Values = expit(self.slope * _finite(scores) + self.intercept)
        return values

    @property
    def constant(self) -> bool:
        """Whether all scores get one probability."""
        return self.slope == 0


@dataclass(frozen=True, slots=True)
class Isotonic:
    """Straight lines between points (score, probability); level beyond the first and the last."""

    scores: tuple[float, ...]
    probabilities: tuple[float, ...]

    def __post_init__(self) -> None:
        x, y = np.array(self.scores, dtype=np.float64), np.array(self.probabilities, dtype=np.float64)
        sound = x.size == y.size > 0 and np.isfinite(x).all() and (np.diff(x) > 0).all()
        if not (sound and (np.diff(y) >= 0).all() and y[0] >= 0 and y[-1] <= 1):
            raise ScoreError("the points of an isotonic calibration must rise, with probabilities between 0 and 1")

    def __call__(self, scores: npt.ArrayLike) -> Values:
        """Return the probability of each score, `[N] → [N]`.

        Raises:
            ScoreError: a score is NaN or infinite.
        """
        values = _finite(scores)
        ends = np.searchsorted(self.scores, values).clip(max=len(self.scores) - 1)
        # Rounding may carry a line past its own end.
        found: Values = np.minimum(
            np.interp(values, self.scores, self.probabilities), np.take(self.probabilities, ends)
        )
        return found

    @property
    def constant(self) -> bool:
        """Whether all scores get one probability."""
        return self.probabilities[0] == self.probabilities[-1]


@dataclass(frozen=True, slots=True)
class JudgedPairs:
    """Scores `[N]`, whether the passage is relevant `[N]`, and the number of the query `[N]`, of a run's candidates."""

    scores: Values
    relevant: Labels
    query: Groups

    def centred(self) -> JudgedPairs:
        """Return the same pairs with the mean over each query's candidates subtracted from its scores."""
        means = np.bincount(self.query, self.scores) / np.maximum(np.bincount(self.query), 1)
        return JudgedPairs(self.scores - means[self.query], self.relevant, self.query)

    @property
    def queries(self) -> int:
        """How many queries there are."""
        return len(np.unique(self.query))

    @property
    def answerable(self) -> int:
        """How many of them have a relevant candidate."""
        return len(np.unique(self.query[self.relevant]))


def judged_pairs(
    run: Run, qrels: Qrels, depth: int | None = None, passages: Mapping[str, Passage] = MappingProxyType({})
) -> JudgedPairs:
    """Return the candidates of a run that the model could read, with their judgements; unjudged ones are not relevant.

    Args:
        run: rankings of judged queries.
        qrels: a grade of 1 or more is relevant.
        depth: the reranking depth, where the run carries the passages below it along with made-up scores.
        passages: by id; those without text were read by no model, and a run's file does not say so.

    Raises:
        UnknownIdError: a query that is not judged.
        ScoreError: no candidate is relevant, or all are.
    """
    scores, relevant, query = [], [], []
    for number, (query_id, ranking) in enumerate(run.items()):
        if query_id not in qrels:
            raise UnknownIdError(f"run {run.tag!r}: query {query_id!r} has no judgements in this split")
        for hit in ranking.hits[:depth]:
            passage = passages.get(hit.passage_id)
            if (passage is not None and passage.blank) or hit.passage_id in ranking.unreadable:
                continue
            scores.append(hit.score)
            relevant.append(qrels[query_id].get(hit.passage_id, 0) >= 1)
            query.append(number)
    if not any(relevant) or all(relevant):
        which = "no candidate is" if not any(relevant) else "all candidates are"
        raise ScoreError(f"run {run.tag!r}: {which} relevant; a calibration is fitted on both kinds")
    return JudgedPairs(np.array(scores), np.array(relevant), np.array(query))


def fit(method: str, scores: npt.ArrayLike, relevant: npt.ArrayLike) -> Platt | Isotonic:
    """Fit a calibration; it is constant where relevant passages score no higher than the others.

    Args:
        method: one of `Method`.
        scores: `[N]`.
        relevant: `[N]`.

    Raises:
        OptionError: an unknown method.
        ScoreError: a score is NaN or infinite, or only one kind of passage is there.
    """
    fits: dict[str, Callable[[Values, Labels], Platt | Isotonic]] = {"platt": _fit_platt, "isotonic": _fit_isotonic}
    if method not in fits:
        raise OptionError(f"unknown calibration {method!r}{nearest(method, get_args(Method))}")
    values, labels = _finite(scores), np.asarray(relevant, dtype=bool)
    if labels.all() or not labels.any():
        raise ScoreError("a calibration is fitted on relevant and on other passages; here is only one kind")
    return fits[method](values, labels)


def folds(pairs: JudgedPairs, count: int, seed: int = 0) -> Groups:
    """Return the fold of each pair, `[N]`; a query is in one fold, and answerable queries are spread over all.

    Raises:
        OptionError: fewer than two folds, or fewer answerable queries than folds.
    """
    at_least(2, folds=count)
    if pairs.answerable < count:
        raise OptionError(f"--folds is {count}, but only {pairs.answerable} queries have a relevant candidate")
    queries = np.random.default_rng(seed).permutation(np.unique(pairs.query))
    answerable = np.isin(queries, pairs.query[pairs.relevant])
    ordered = np.concatenate([queries[answerable], queries[~answerable]])
    fold_of = np.empty(ordered.max() + 1, dtype=np.int64)
    fold_of[ordered] = np.arange(len(ordered)) % count
    return fold_of[pairs.query]


def out_of_fold(method: str | None, pairs: JudgedPairs, fold: Groups) -> Values:
    """Return for each pair what a calibration says that was fitted on the other folds, `[N]`.

    Args:
        method: one of `Method`; None says of all pairs what share of the others is relevant (the base rate).
        pairs: what is fitted and predicted.
        fold: from `folds`.

    Raises:
        OptionError: an unknown method.
        ScoreError: outside of a fold, only one kind of passage is left.
    """
    found = np.empty(len(pairs.scores))
    for number in np.unique(fold):
        held = fold == number
        if method is None:
            found[held] = pairs.relevant[~held].mean()
        else:
            found[held] = fit(method, pairs.scores[~held], pairs.relevant[~held])(pairs.scores[held])
    return found


def brier(probabilities: Values, relevant: Labels) -> float:
    """Return the mean squared error of probabilities."""
    return float(np.mean((probabilities - relevant) ** 2))


@dataclass(frozen=True, slots=True)
class Bin:
    """Pairs of neighbouring probabilities: how many, what they promise on average, and what share is relevant."""

    pairs: int
    promised: float
    relevant: float


def reliability(probabilities: Values, relevant: Labels, edges: Values | None = None) -> list[Bin]:
    """Return the bins that are not empty; equal probabilities stand in one bin.

    Args:
        probabilities: `[N]`.
        relevant: `[N]`.
        edges: rising bounds between bins; by default those of ten bins that hold about equally many pairs.
    """
    if edges is None:
        edges = np.unique(np.quantile(probabilities, np.linspace(0, 1, _BINS + 1)[1:-1]))
    place = np.searchsorted(edges, probabilities, side="right")
    inside = [place == number for number in np.unique(place)]
    return [Bin(int(b.sum()), float(probabilities[b].mean()), float(relevant[b].mean())) for b in inside]


def expected_calibration_error(probabilities: Values, relevant: Labels) -> float:
    """Return the mean over pairs of |promised − relevant| of their bins."""
    bins = reliability(probabilities, relevant)
    return sum(each.pairs * abs(each.promised - each.relevant) for each in bins) / len(probabilities)


@dataclass(frozen=True, slots=True)
class Kept:
    """What is left above a threshold: precision as promised, as found, and its range over folds; recall.

    None where nothing is left.
    """

    threshold: float
    per_query: float
    promised: float | None
    precision: float | None
    range: tuple[float, float] | None
    recall: float


def keep(threshold: float, probabilities: Values, pairs: JudgedPairs, fold: Groups) -> Kept:
    """Keep the pairs with a probability of at least `threshold`; `probabilities` come from `out_of_fold`."""
    above = probabilities >= threshold
    recall = float(above[pairs.relevant].mean())
    if not above.any():
        return Kept(threshold, 0.0, None, None, None, recall)
    of_folds = [float(pairs.relevant[above & (fold == n)].mean()) for n in np.unique(fold[above])]
    return Kept(
        threshold,
        above.sum() / pairs.queries,
        float(probabilities[above].mean()),
        float(pairs.relevant[above].mean()),
        (min(of_folds), max(of_folds)),
        recall,
    )


def separation(pairs: JudgedPairs) -> tuple[float, float]:
    """Return how often a relevant passage scores above another one: of one query (mean over queries), and of any two.

    Ties count half. The gap between the two is what scores lose from query to query.
    """
    within = [
        _area(pairs.scores[own], pairs.relevant[own])
        for number in np.unique(pairs.query[pairs.relevant])
        if not pairs.relevant[own := pairs.query == number].all()
    ]
    return float(np.mean(within)) if within else math.nan, _area(pairs.scores, pairs.relevant)


def _area(scores: Values, relevant: Labels) -> float:
    """Return the area under the ROC curve."""
    from scipy.stats import rankdata

    positive = int(relevant.sum())
    above = rankdata(scores)[relevant].sum() - positive * (positive + 1) / 2
    return float(above / (positive * (len(scores) - positive)))


def _fit_platt(scores: Values, relevant: Labels) -> Platt:
    from scipy.optimize import minimize
    from scipy.special import expit

    positive, count = int(relevant.sum()), len(scores)
    labels = np.where(relevant, (positive + 1) / (positive + 2), 1 / (count - positive + 2))
    centre, spread = scores.mean(), scores.std() or 1.0
    standardised = (scores - centre) / spread

    def loss(weights: Values) -> tuple[float, Values]:
        logits = weights[0] * standardised + weights[1]
        error = expit(logits) - labels
        gradient = _pair(np.mean(error * standardised), np.mean(error))
        return float(np.mean(np.logaddexp(0, logits) - labels * logits)), gradient

    start = _pair(0.0, math.log(positive / (count - positive)))
    found = minimize(
        loss, start, jac=True, method="L-BFGS-B", bounds=[(0, None), (None, None)], options={"ftol": 0, "gtol": 1e-10}
    )
    slope = float(found.x[0] / spread)
    return Platt(slope, float(found.x[1] - slope * centre))


def _fit_isotonic(scores: Values, relevant: Labels) -> Isotonic:
    from scipy.optimize import isotonic_regression

    # Equal scores are one point, or they would get several probabilities.
    points, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    shares = np.bincount(inverse, weights=relevant) / counts
    fitted = isotonic_regression(shares, weights=counts)
    kept = np.union1d(fitted.blocks[:-1], fitted.blocks[1:] - 1)  # the first and the last point of every step
    return Isotonic(tuple(points[kept].tolist()), tuple(fitted.x[kept].clip(0, 1).tolist()))


def _pair(first: float, second: float) -> Values:
    return np.array([first, second], dtype=np.float64)


def _finite(scores: npt.ArrayLike) -> Values:
    values = np.asarray(scores, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ScoreError("a score is NaN or infinite; it has no probability")
    return values
