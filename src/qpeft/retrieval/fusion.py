"""Reciprocal-rank fusion of runs (Cormack, Clarke and Büttcher, SIGIR 2009).

score(p) = Σ_runs 1 / (k + rank_run(p))        rank from 1; a run that lacks the passage adds nothing
"""

from __future__ import annotations

import collections
from collections.abc import Sequence

from qpeft.errors import OptionError, at_least
from qpeft.types import Ranking, Run


def reciprocal_rank_fusion(runs: Sequence[Run], depth: int | None = None, k: int = 60, tag: str | None = None) -> Run:
    """Fuse runs; a query is ranked if any of them ranks it.

    Args:
        runs: two or more.
        depth: passages kept per query; all by default.
        k: the larger, the less the first ranks stand out.
        tag: of the result; by default made of the runs' tags.

    Raises:
        OptionError: fewer than two runs, or a depth or k out of range.
    """
    if len(runs) < 2:
        raise OptionError("fusion needs at least two runs")
    at_least(0, k=k)
    at_least(1, depth=depth)
    query_ids = dict.fromkeys(query_id for run in runs for query_id in run)
    fused = []
    for query_id in query_ids:
        scores: dict[str, float] = collections.defaultdict(float)
        for run in runs:
            for rank, hit in enumerate(run[query_id].hits if query_id in run else (), start=1):
                scores[hit.passage_id] += 1 / (k + rank)
        fused.append(Ranking(query_id, Ranking.from_scores(query_id, scores.items()).hits[:depth]))
    return Run(fused, tag or "rrf(" + ",".join(run.tag for run in runs) + ")")
