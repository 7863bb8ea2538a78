"""What a ranking cost, to stand beside how good it is.

With C the FLOPs of a query (`qpeft.lm.flops`), averaged over the queries ranked, in PetaFLOP:

    QPP = 1 / C             queries per PetaFLOP
    RPP = measure / C       ranking quality per PetaFLOP; the measure is averaged over the same queries

After E2R-FLOPs (Peng et al. 2025, arXiv 2507.06223), which defines RPP for one query. Ours is the ratio of two means,
not the mean of ratios, in which the queries that cost least would count most. What the first stage costs is not in C.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qpeft.errors import OptionError


@dataclass(frozen=True, slots=True)
class Cost:
    """Wall-clock time and work of one reranking. What is not known is None.

    Attributes:
        seconds: wall-clock time of scoring, in seconds; loading the model is not part of it.
        queries: queries ranked in that time.
        pairs: (query, passage) pairs ranked.
        tokens: tokens that went through the model, padding and what the passage cache held excluded.
        padding: positions that went through the model beside them.
        flops: floating-point operations for `tokens`.
        cached: contexts that the passage cache held.
        encoded: contexts that it did not hold.
        peak_memory: the process's largest resident memory so far, in bytes, loading included.
        peak_device_memory: the most that was allocated on the GPU so far, in bytes.
    """

    seconds: float
    queries: int
    pairs: int
    tokens: int
    padding: int | None = None
    flops: int | None = None
    cached: int | None = None
    encoded: int | None = None
    peak_memory: int | None = None
    peak_device_memory: int | None = None

    def __post_init__(self) -> None:
        if not self.seconds > 0 or min(self.queries, self.pairs, self.tokens) < 0:
            raise OptionError(f"{self}: seconds must be positive and counts not negative")

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> Cost:
        """Return the cost that `as_dict` described, now or in an earlier version.

        Raises:
            OptionError: it describes none.
        """
        try:
            return cls(**{field.name: facts[field.name] for field in dataclasses.fields(cls) if field.name in facts})
        except TypeError as error:
            raise OptionError(f"not a cost: {error}") from error

    def as_dict(self) -> dict[str, Any]:
        """Return the work and the rates, rounded for people to read."""
        facts = dataclasses.asdict(self)
        facts["seconds"] = float(f"{self.seconds:.4g}")
        rates = {
            "queries_per_second": self.queries_per_second,
            "passages_per_second": self.passages_per_second,
            "tokens_per_second": self.tokens_per_second,
            "padded_share": self.padded_share,
            "cache_hit_rate": self.cache_hit_rate,
            "teraflops_per_query": self.teraflops_per_query,
            "queries_per_petaflop": self.queries_per_petaflop,
        }
        return facts | {name: None if rate is None else float(f"{rate:.4g}") for name, rate in rates.items()}

    @property
    def queries_per_second(self) -> float:
        """Queries ranked per second."""
        return self.queries / self.seconds

    @property
    def passages_per_second(self) -> float:
        """(Query, passage) pairs ranked per second."""
        return self.pairs / self.seconds

    @property
    def tokens_per_second(self) -> float:
        """Tokens computed per second."""
        return self.tokens / self.seconds

    @property
    def padded_share(self) -> float | None:
        """Share of padding in what went through the model."""
        if self.padding is None or not self.tokens + self.padding:
            return None
        return self.padding / (self.tokens + self.padding)

    @property
    def cache_hit_rate(self) -> float | None:
        """Share of contexts that the passage cache held."""
        if self.cached is None or self.encoded is None or not self.cached + self.encoded:
            return None
        return self.cached / (self.cached + self.encoded)

    @property
    def teraflops_per_query(self) -> float | None:
        """10¹² floating-point operations, per query."""
        return None if self.flops is None or not self.queries else self.flops / self.queries / 1e12

    @property
    def queries_per_petaflop(self) -> float | None:
        """QPP; see above."""
        return None if not self.teraflops_per_query else 1000 / self.teraflops_per_query

    def quality_per_petaflop(self, mean: float | None) -> float | None:
        """RPP of a measure's mean; see above."""
        return None if mean is None or self.queries_per_petaflop is None else mean * self.queries_per_petaflop


def forget_peak_memory() -> None:
    """Let `peak_memory` count from now on, where the system can (Linux)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory() -> int | None:
    """Return the largest resident memory of this process so far, in bytes; None where the system does not tell."""
    # Linux, whose getrusage also counts what the process was before it became this program: a copy of its parent.
    with suppress(OSError):
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
        if found is not None:
            return int(found[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
