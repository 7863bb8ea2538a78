"""What `rerank` and `analyze` do with the options --limit-queries, --seed and --depth."""

from __future__ import annotations

import random

from qpeft.errors import at_least
from qpeft.types import Run


def sample_run(first: Run, count: int | None, seed: int, depth: int) -> Run:
    """Return a random sample of a run's queries, in the run's order; all of them where there are no more than that.

    Raises:
        OptionError: a count or a depth below 1.
    """
    at_least(1, depth=depth, limit_queries=count)
    if count is None or count >= len(first):
        return first
    chosen = set(random.Random(seed).sample(sorted(first), count))
    return Run((ranking for query_id, ranking in first.items() if query_id in chosen), first.tag)
