"""What a ranking cost, to stand beside how good it is."""

from __future__ import annotations

from dataclasses import dataclass

from qpeft.errors import OptionError


@dataclass(frozen=True, slots=True)
class Cost:
    """Wall-clock time and work of one reranking.

    Attributes:
        seconds: wall-clock time of scoring, in seconds; loading the model is not part of it.
        queries: queries ranked in that time.
        pairs: (query, passage) pairs scored.
        tokens: tokens that went through the model, padding excluded.
    """

    seconds: float
    queries: int
    pairs: int
    tokens: int

    def __post_init__(self) -> None:
        if not self.seconds > 0 or min(self.queries, self.pairs, self.tokens) < 0:
            raise OptionError(f"{self}: seconds must be positive and counts not negative")

    def as_dict(self) -> dict[str, float]:
        """Return the work and the rates, rounded for people to read."""
        return {
            "seconds": round(self.seconds, 2),
            "queries": self.queries,
            "pairs": self.pairs,
            "tokens": self.tokens,
            "queries_per_second": round(self.queries_per_second, 2),
            "passages_per_second": round(self.passages_per_second, 1),
            "tokens_per_second": round(self.tokens_per_second, 1),
        }

    @property
    def queries_per_second(self) -> float:
        """Queries ranked per second."""
        return self.queries / self.seconds

    @property
    def passages_per_second(self) -> float:
        """(Query, passage) pairs scored per second."""
        return self.pairs / self.seconds

    @property
    def tokens_per_second(self) -> float:
        """Tokens processed per second."""
        return self.tokens / self.seconds
