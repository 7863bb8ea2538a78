"""The cells of the experiment: what is trained on what, with which options and seed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

SEEDS = (1, 2, 3)
HOMES = ("reddit-shift", "squad")


@dataclass(frozen=True)
class Cell:
    """One training, and where its result is measured."""

    row: str
    """Name of the row in the table."""
    adapter: str
    home: str
    """Collection that is trained on; several are joined by +."""
    queries: int = 320
    seed: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    """Of the adapter."""
    training: dict[str, Any] = field(default_factory=dict)
    """Of training."""
    template: str = "plain"
    shuffled: bool = False
    """The adapter reads another query than the one that is scored, in training and in test (control)."""
    test: bool = True
    """Whether test collections are ranked; otherwise dev alone."""

    @property
    def name(self) -> str:
        """A name that is the same for the same settings alone."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:8]
        return f"{self.home}-{self.queries}-{self.row}-seed{self.seed}-{digest}"


def tuning() -> Iterator[Cell]:
    """Yield the settings that were compared on dev of reddit-shift."""
    rates = {
        "qpeft_a": (1e-3, 3e-3),
        "qpeft_r": (1e-3, 3e-3),
        "soft_prompt": (3e-3, 1e-2),
        "qpeft_c": (1e-3, 3e-3),
        "passage_prompt": (1e-3, 3e-3),
    }
    for place in range(2):
        for adapter, choices in rates.items():
            training = {"learning_rate": choices[place], "evaluations": 2}
            yield Cell(f"{adapter}-lr{choices[place]}", adapter, "reddit-shift", training=training, test=False)


GROUPS = {"tuning": tuning}
