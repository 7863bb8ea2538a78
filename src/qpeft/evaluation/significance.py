"""Is the difference between two runs more than chance over queries?

All tests are two-sided and paired over the queries, on the differences d_1 … d_n of a measure between two runs:

* `t`: paired t-test. The paper's own choice, and the default: of the tests in use it keeps its level best on
  retrieval measures (Urbano, Lima, Hanjalic, SIGIR 2019).
* `wilcoxon`: signed-rank test; queries without a difference are dropped.
* `permutation`: sign-flip (Fisher randomisation) test of the mean (Smucker, Allan, Carterette, CIKM 2007): exact where
  there are few differences, else p = (1 + #{|mean*| ≥ |mean|}) / (1 + resamples).

p-values are corrected by Holm's step-down method over everything that one call compares, runs times measures.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from scipy import stats

from qpeft.errors import OptionError, at_least
from qpeft.evaluation.measures import Evaluation

Test = Literal["t", "wilcoxon", "permutation"]
Floats = npt.NDArray[np.float64]

CONFIDENCE = 0.95
"""Coverage of the intervals."""
TIE = 1e-9
"""Values closer than this are equal: two orders of one set of gains may differ by rounding."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """A run against a baseline on one measure.

    Attributes:
        measure: notation of the measure.
        baseline: tag of the run compared with.
        run: tag of the run.
        queries: number of queries for which both have a value.
        baseline_mean: mean of the baseline over these queries; None over no query, as below.
        mean: mean of the run over these queries.
        difference: `mean` − `baseline_mean`.
        interval: bootstrap percentile interval of `difference`, 95 %; None for fewer than two queries.
        wins: queries on which the run is better than the baseline.
        ties: queries on which they are equal within 1e-9.
        losses: queries on which the run is worse.
        p_values: test → p; None where the test is not defined (paired t on one query, or on equal differences).
        corrected: the same after Holm's correction.
    """

    measure: str
    baseline: str
    run: str
    queries: int
    baseline_mean: float | None
    mean: float | None
    difference: float | None
    interval: tuple[float, float] | None
    wins: int
    ties: int
    losses: int
    p_values: Mapping[str, float | None]
    corrected: Mapping[str, float | None]

    def significant(self, test: Test = "t", alpha: float = 0.05) -> bool:
        """Tell whether the corrected p-value is at most `alpha`."""
        p = self.corrected[test]
        return p is not None and p <= alpha


def compare(
    baseline: Evaluation, others: Iterable[Evaluation], *, resamples: int = 10_000, seed: int = 0
) -> list[Comparison]:
    """Compare runs with one baseline on every measure that both have.

    Args:
        baseline: the run to beat.
        others: the runs; evaluated on the same queries.
        resamples: number of sign flips and of bootstrap samples.
        seed: of both; a comparison does not depend on what else is compared, but for Holm's correction.

    Raises:
        OptionError: fewer than one resample, two runs with one tag, other queries than the baseline's, or no measure in
            common.
    """
    return _compare([(baseline, other) for other in others], resamples, seed)


def compare_all_pairs(evaluations: Sequence[Evaluation], *, resamples: int = 10_000, seed: int = 0) -> list[Comparison]:
    """Compare each run with each one before it; see `compare`."""
    return _compare(list(itertools.combinations(evaluations, 2)), resamples, seed)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Correct p-values for testing several hypotheses (Holm 1979).

    With p_(1) ≤ … ≤ p_(m): corrected p_(i) = max over j ≤ i of min(1, (m − j + 1)·p_(j)). None is not counted in m.
    """
    tested = sorted((p, position) for position, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, position) in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - rank) * p))
        corrected[position] = largest
    return corrected


def paired_t(differences: Floats) -> float | None:
    """Two-sided p of the paired t-test; None on one query, or where all differences are equal but not zero."""
    if not np.any(differences):
        return 1.0 if differences.size else None
    if differences.size < 2 or np.ptp(differences) <= TIE:
        return None
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def wilcoxon(differences: Floats) -> float | None:
    """Two-sided p of the Wilcoxon signed-rank test, queries without a difference dropped."""
    # 1/2 - 1/3 and 1/6 - 0 are the same difference, and only rounding would rank one above the other
    differences = np.round(differences, 9)
    if not np.any(differences):
        return 1.0 if differences.size else None
    return float(stats.wilcoxon(differences, zero_method="wilcox").pvalue)


def permutation(differences: Floats, *, resamples: int = 10_000, seed: int = 0) -> float | None:
    """Two-sided p of the sign-flip test of the mean; exact if all flips are no more than `resamples`."""
    changed = differences[differences != 0]  # flipping the sign of nothing changes nothing
    if not changed.size:
        return 1.0 if differences.size else None
    reached = abs(changed.sum()) - TIE
    if changed.size < 63 and 2**changed.size <= resamples:
        flips = np.arange(2**changed.size)[:, None] >> np.arange(changed.size) & 1
        return float(np.mean(np.abs((2.0 * flips - 1) @ changed) >= reached))
    rng = np.random.default_rng(seed)
    beyond = 0
    for done in range(0, resamples, 1000):
        flips = rng.integers(0, 2, (min(1000, resamples - done), changed.size), dtype=np.int8)
        beyond += int(np.count_nonzero(np.abs((2.0 * flips - 1) @ changed) >= reached))
    return (1 + beyond) / (1 + resamples)


def bootstrap_interval(values: Floats, *, resamples: int = 10_000, seed: int = 0) -> tuple[float, float] | None:
    """95 % percentile interval of the mean over queries drawn with replacement; None for fewer than two queries."""
    if values.size < 2:
        return None
    found = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=resamples,
        batch=1000,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)


def _compare(pairs: Sequence[tuple[Evaluation, Evaluation]], resamples: int, seed: int) -> list[Comparison]:
    at_least(1, resamples=resamples)
    comparisons = [
        _comparison(baseline, other, measure, resamples, seed)
        for baseline, other in pairs
        for measure in _common_measures(baseline, other)
    ]
    corrected = {test: holm([each.p_values[test] for each in comparisons]) for test in get_args(Test)}
    return [
        replace(each, corrected={test: values[position] for test, values in corrected.items()})
        for position, each in enumerate(comparisons)
    ]


def _common_measures(baseline: Evaluation, other: Evaluation) -> list[str]:
    if baseline.run == other.run:
        raise OptionError(f"two runs are tagged {other.run!r}; a comparison needs distinct tags")
    if set(baseline.queries) != set(other.queries):
        raise OptionError(
            f"runs {baseline.run!r} ({len(baseline.queries)} queries) and {other.run!r} ({len(other.queries)} queries) "
            "are evaluated on different queries"
        )
    measures = [measure for measure in baseline.measures if measure in other.per_query]
    if not measures:
        raise OptionError(f"runs {baseline.run!r} and {other.run!r} have no measure in common")
    return measures


def _comparison(baseline: Evaluation, other: Evaluation, measure: str, resamples: int, seed: int) -> Comparison:
    differences = per_query_differences(baseline, other, measure)
    shared = list(differences)
    d = np.array(list(differences.values()), dtype=np.float64)
    p_values = {
        "t": paired_t(d),
        "wilcoxon": wilcoxon(d),
        "permutation": permutation(d, resamples=resamples, seed=seed),
    }
    return Comparison(
        measure=measure,
        baseline=baseline.run,
        run=other.run,
        queries=len(shared),
        baseline_mean=_mean([baseline.per_query[measure][query_id] for query_id in shared]),
        mean=_mean([other.per_query[measure][query_id] for query_id in shared]),
        difference=_mean(list(differences.values())),
        interval=bootstrap_interval(d, resamples=resamples, seed=seed),
        wins=int(np.count_nonzero(d > 0)),
        ties=int(np.count_nonzero(d == 0)),
        losses=int(np.count_nonzero(d < 0)),
        p_values=p_values,
        corrected=p_values,
    )


def per_query_differences(baseline: Evaluation, other: Evaluation, measure: str) -> dict[str, float]:
    """Return query id → value of `other` − value of `baseline`, where both have one; below 1e-9 it is 0."""
    of_baseline, of_other = baseline.per_query[measure], other.per_query[measure]
    return {
        query_id: 0.0 if abs(of_other[query_id] - value) < TIE else of_other[query_id] - value
        for query_id, value in of_baseline.items()
        if query_id in of_other
    }


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
