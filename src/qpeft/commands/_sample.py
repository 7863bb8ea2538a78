"""What `rerank` and `analyze` do with the options --limit-queries, --seed and --depth."""

from __future__ import annotations

import random

from qpeft.errors import OptionError
from qpeft.types import Run


def sample_run(first: Run, count: int | None, seed: int, depth: int) -> Run:
    """Return a random sample of a run's queries, in the run's order; all of them where there are no more than that.

    Raises:
        OptionError: a count or a depth below 1.
    """
    if depth < 1:
        raise OptionError(f"--depth is {depth}; it must be at least 1")
    if count is None or count >= len(first):
        return first
    if count < 1:
        raise OptionError(f"--limit-queries is {count}; it must be at least 1")
    chosen = set(random.Random(seed).sample(sorted(first), count))
    return Run((ranking for query_id, ranking in first.items() if query_id in chosen), first.tag)
