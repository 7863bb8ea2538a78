"""Intervals of a study: over queries and over seeds.

A line's measure M is the mean over n queries and over S trainings that differ by seed. It is drawn again as

    M* = M + (mean of n drawn queries − M) + √(S / (S − 1)) · (mean of S drawn seeds − M)

with replacement, where a query stands for its mean over seeds, and a seed for its mean over queries. What is derived
from several lines is derived from their draws; an interval holds 95 % of them.

* All lines draw the same queries. Lines with the same seeds draw the same seeds, since a seed chooses the questions of
  a training, their negatives and their order. So differences are paired in both.
* The factor makes the draws vary as seeds do: S of S drawn with replacement have (S − 1) / S of their variance, which
  for three is two thirds.
* The variance is that over queries and that over seeds; what a seed does to a query alone is counted twice. It is
  counted three times where both are drawn at once (Owen, Annals of Applied Statistics 2007).
* A single training has no variance over seeds: its intervals are over queries.
"""

from __future__ import annotations

import zlib
from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from qpeft.evaluation.significance import Floats

Interval = tuple[float, float] | None
RESAMPLES, TOGETHER = 10_000, 1_000


def is_clear(bounds: Interval) -> bool:
    """Return whether an interval lies on one side of 0."""
    return bounds is not None and (bounds[0] > 0 or bounds[1] < 0)


def draws(per_query: Floats, by_seed: Sequence[Mapping[Hashable, float]]) -> Floats:
    """Return the measures of lines on resamples, `[lines, resamples]`; always the same for the same values.

    Args:
        per_query: means over seeds, `[lines, queries]`.
        by_seed: of each line, means over queries by seed.
    """
    queries = per_query.shape[1]
    rng = np.random.default_rng(0)
    found = np.concatenate(
        [
            per_query @ rng.multinomial(queries, np.full(queries, 1 / queries), size=TOGETHER).T / queries
            for _ in range(RESAMPLES // TOGETHER)
        ],
        axis=1,
    )
    for line, means in zip(found, by_seed, strict=True):
        line += _from_seeds(means)
    return found.round(12)  # lines with the same values stay the same, in whatever order a product is added up


def interval(drawn: Floats) -> tuple[float, float]:
    """Return what holds 95 % of the draws."""
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def ratio_interval(above: Floats, below: Floats) -> Interval:
    """Return the interval of a ratio; None where its denominator is not clearly above 0: it could be anything."""
    if interval(below)[0] <= 0:
        return None
    return interval(above[below > 0] / below[below > 0])


def _from_seeds(means: Mapping[Hashable, float]) -> Floats:
    count = len(means)
    if count < 2:
        return np.zeros(RESAMPLES)
    names = sorted(means, key=repr)
    away = np.array([means[name] for name in names]) - np.mean(list(means.values()))
    rng = np.random.default_rng(zlib.crc32(repr(names).encode()))
    chosen = rng.multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    drawn: Floats = np.sqrt(count / (count - 1)) * (chosen @ away) / count
    return drawn
