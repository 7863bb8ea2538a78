"""The cells of the experiment: what is trained on what, with which options and seed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from qpeft.adapters import qpeft_a, qpeft_r
from qpeft.training.config import Authors as TrainingAuthors

SEEDS = (1, 2, 3)


@dataclass(frozen=True)
class Cell:
    """One training, and where its result is measured."""

    row: str
    """Name of the row in the table."""
    adapter: str
    """Its name; empty for the model alone."""
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


RATES = {"soft_prompt": 3e-3, "lora": 3e-3}
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
        for adapter in ("qpeft_a", "qpeft_r", "soft_prompt"):
            yield cell(adapter, adapter, "reddit-shift", 1, queries)


def authors() -> Iterator[Cell]:
    """Yield the settings of the authors' code."""
    for adapter, module in (("qpeft_a", qpeft_a), ("qpeft_r", qpeft_r)):
        yield Cell(
            f"{adapter}-authors",
            adapter,
            "reddit-shift",
            options=asdict(module.Authors()),
            training=asdict(TrainingAuthors()) | {"report_to": []},
            template="qpeft_authors",
        )


def lora_tuning() -> Iterator[Cell]:
    """Yield learning rates of LoRA that were compared on dev."""
    for rate in (3e-4, 1e-3, 3e-3, 1e-2):
        training = {"learning_rate": rate, "epochs": 2, "evaluations": 2}
        yield Cell(f"lora-lr{rate}", "lora", "reddit-shift", options={"r": 4}, training=training, test=False)


def lora() -> Iterator[Cell]:
    """Yield LoRA: with about as many parameters as Q-PEFT-A, with rank 8, and with Q-PEFT-A's hint."""
    for name, options in (
        ("lora_r4", {"r": 4}),
        ("lora_r8", {"r": 8}),
        ("lora_r4+qpeft_a", {"r": 4, "hint": "qpeft_a"}),
    ):
        yield cell(name, "lora", "reddit-shift", 1, options=options)


PROMPTS = {
    "p1": "qpeft",
    "p1-keywords": "qpeft",
    "p1-query": "qpeft",
    "p2": "prompts/p2.yaml",
    "p3": "prompts/p3.yaml",
    "p4": "prompts/p4.yaml",
}
"""Hard prompts: an instruction each, and the first with other words before the hint. Files are of this folder."""


def prompts() -> Iterator[Cell]:
    """Yield hard prompts, for the model alone and under Q-PEFT-A."""
    for name, template in PROMPTS.items():
        word = name.partition("-")[2]
        options = {"hint_prefix": f"{word}:"} if word else {}
        if not word:
            yield Cell(f"zero_shot-{name}", "", "reddit-shift", template=template)
        yield cell(f"qpeft_a-{name}", "qpeft_a", "reddit-shift", 1, template=template, options=options)


def search() -> Iterator[Cell]:
    """Yield options of Q-PEFT that were compared on dev, one changed at a time."""
    changed: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
        *(("qpeft_r", {"k": k}, {}, "plain") for k in (5, 15, 20)),
        *(("qpeft_a", {"num_heads": heads}, {}, "plain") for heads in (1, 4, 8)),
        *(("qpeft_a", {}, {"margin": margin}, "plain") for margin in (0.0, 1.0)),
        *(("qpeft_a", {}, {"loss": loss}, "plain") for loss in ("point", "pair", "softmax")),
        ("qpeft_r", {"token_filter": "dsa"}, {}, "plain"),
        ("qpeft_a", {"token_filter": "s"}, {}, "plain"),
        ("qpeft_a", {}, {}, "qpeft"),
        ("qpeft_a", {}, {}, "qpeft_prefix"),
        *(("qpeft_r", {"hint_prefix": f"{word}:"}, {}, "plain") for word in ("keywords", "query")),
    ]
    for adapter, options, training, template in changed:
        settings = {"learning_rate": 1e-3, "epochs": 2, "evaluations": 2} | training
        told = [f"{name}={value}" for name, value in {**options, **training}.items()]
        told += [template] if template != "plain" else []
        row = f"{adapter}-{'-'.join(told)}".replace(":", "")
        yield Cell(row, adapter, "reddit-shift", options=options, training=settings, template=template, test=False)


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
    "authors": authors,
    "lora_tuning": lora_tuning,
    "lora": lora,
    "sizes": sizes,
    "prompts": prompts,
    "search": search,
    "transfer_homes": transfer_homes,
}
