"""Recall and hit rate relative to the candidates: the measures of the Q-PEFT protocol.

They ask how well a given list was reordered, not how good the list is: the denominator of recall is the number of
relevant passages among the candidates, not in the collection. "The candidates" are the passages that a run ranks for
the query, or the first `depth` of them, where only these were reranked.

With y_1 … y_n the relevance labels in ranked order and R = Σ y (arXiv 2404.04522, and Q-PEFT's public code):

    CandR@k   = Σ_{i≤k} y_i / R
    CandHit@k = 1 if Σ_{i≤k} y_i ≥ 1 else 0

A query with R = 0 counts as 0 (the *full* variant), or is left out of the mean (the *clean* one, `…_clean@k`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import ir_measures

_ParamInfo: Any = ir_measures.ParamInfo  # the library does not annotate its constructor


class CandidateMeasure(ir_measures.Measure):
    """What the four have in common: the parameters, in ir_measures' own terms, and the arithmetic."""

    SUPPORTED_PARAMS = {  # noqa: RUF012  (declared without ClassVar by the base class)
        "cutoff": _ParamInfo(dtype=int, required=True, desc="ranking cutoff k"),
        "rel": _ParamInfo(dtype=int, default=1, desc="lowest grade that counts as relevant"),
        "depth": _ParamInfo(dtype=int, default=None, desc="number of candidates; all that the run ranks by default"),
    }
    hit: ClassVar[bool]
    clean: ClassVar[bool]

    def value(self, grades: Sequence[int]) -> float | None:
        """Return the measure for one query.

        Args:
            grades: grades of the ranked passages, best rank first; 0 for an unjudged one.

        Returns:
            A value in [0, 1], or None for a query that the clean variant leaves out.
        """
        labels = [grade >= self["rel"] for grade in grades[: self["depth"]]]
        relevant = sum(labels)
        if not relevant:
            return None if self.clean else 0.0
        found = sum(labels[: self["cutoff"]])
        return float(found > 0) if self.hit else found / relevant


class CandR(CandidateMeasure):
    """Recall of the relevant candidates; queries without any count as 0."""

    __name__ = NAME = "CandR"
    hit, clean = False, False


class CandHit(CandidateMeasure):
    """Whether a relevant candidate is among the first k; queries without any count as 0."""

    __name__ = NAME = "CandHit"
    hit, clean = True, False


class CandRClean(CandidateMeasure):
    """Recall of the relevant candidates; queries without any are left out."""

    __name__ = NAME = "CandR_clean"
    hit, clean = False, True


class CandHitClean(CandidateMeasure):
    """Whether a relevant candidate is among the first k; queries without any are left out."""

    __name__ = NAME = "CandHit_clean"
    hit, clean = True, True


CANDIDATE_MEASURES: dict[str, type[CandidateMeasure]] = {
    str(measure.NAME): measure for measure in (CandR, CandHit, CandRClean, CandHitClean)
}
