"""The cells of the experiment: what is trained on what, with which options and seed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

SEEDS = (1, 2, 3)


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
    """Whether the home's test queries are ranked (the first home's); otherwise dev alone."""

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


RATES = {"soft_prompt": 3e-3}
"""Learning rates that differ from 1e-3; chosen on dev (README)."""


def cell(row: str, adapter: str, home: str, seed: int, queries: int = 320, **more: Any) -> Cell:
    """Return a cell with the settings that dev chose."""
    training = {"learning_rate": RATES.get(adapter, 1e-3), "epochs": 2, "evaluations": 2, **more.pop("training", {})}
    return Cell(row, adapter, home, queries, seed, training=training, **more)


def main() -> Iterator[Cell]:
    """Yield the table: what is trained on reddit-shift, with its controls."""
    for seed in SEEDS:
        for adapter in ("qpeft_a", "qpeft_r", "soft_prompt"):
            yield cell(adapter, adapter, "reddit-shift", seed)
    for seed in SEEDS:
        yield cell("random_k", "qpeft_r", "reddit-shift", seed, options={"select": "random"})
        yield cell("shuffled_a", "qpeft_a", "reddit-shift", seed, shuffled=True)
        yield cell("passage_prompt", "passage_prompt", "reddit-shift", seed)
        yield cell("qpeft_c", "qpeft_c", "reddit-shift", seed)


def untrained() -> Iterator[Cell]:
    """Yield modules without training; an untrained Q-PEFT-R is its hint as plain text."""
    for adapter in ("qpeft_a", "qpeft_r"):
        yield cell(f"untrained_{adapter[-1]}", adapter, "reddit-shift", 1, training={"epochs": 0})


def sizes() -> Iterator[Cell]:
    """Yield other numbers of training queries."""
    for queries in (80, 1280):
        for adapter in ("qpeft_a", "soft_prompt"):
            yield cell(adapter, adapter, "reddit-shift", 1, queries)


def transfer_homes() -> Iterator[Cell]:
    """Yield other training data, for the question of transfer."""
    mixed = "reddit-shift+squad+wiki-shift+nq-mini"
    yield cell("qpeft_a", "qpeft_a", mixed, 1, 640)
    yield cell("qpeft_r", "qpeft_r", mixed, 1, 640)
    yield cell("qpeft_a", "qpeft_a", "squad", 1)
    yield cell("qpeft_a-anchor", "qpeft_a", "squad", 1, training={"anchor": 1.0})


GROUPS = {
    "tuning": tuning,
    "main": main,
    "untrained": untrained,
    "sizes": sizes,
    "transfer_homes": transfer_homes,
}
