"""What is trained, and what is asked of it.

Every setting that could be chosen was chosen on dev (rates); test is read by the studies alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

SEEDS = (1, 2, 3)
RANKS = (1, 2, 8, 32)
RATES = (1e-4, 3e-4, 1e-3, 3e-3)
"""Learning rates that are compared on dev, at rank 8 and seed 1."""
CHOSEN = {("query_likelihood", "reddit-shift"): 1e-3, ("query_likelihood", "squad"): 1e-4}
"""(method, collection) → learning rate, where dev chose another than 3e-4."""
COLLECTIONS = ("reddit-shift", "squad")
LOSSES = {"query_likelihood": "both", "classifier": "softmax", "yes_no": "softmax"}
TEMPLATES = {"classifier": "passage_first"}
"""method → template, where it is not the method's own: tiny-lm knows queries behind passages (docs/rerankers.md)."""
EQUAL = {"attention": 18, "mlp": 14}
"""Ranks at which tiny-lm's components have the budget of both at rank 8 (331,776): 331,776 and 322,560."""
KEEP_EVERY = 20

TRAINING = {
    "train-queries": 320, "epochs": 3, "negatives": 3, "max-passage-tokens": 96,
    "dev-queries": 60, "dev-depth": 20, "evaluations": 2, "measure": "nDCG@10",
}  # fmt: skip
STEP_QUERIES = 8
"""Queries of an optimiser's step, in one forward pass or several."""
STUDY = {"limit-queries": 200, "depth": 20, "measure": "nDCG@10"}
DETAIL = STUDY | {"depth": 10}
"""Of the studies with an ablation per layer or projection, which rank many times over."""


@dataclass(frozen=True)
class Cell:
    """One training."""

    collection: str
    method: str
    modules: str = "all"
    rank: int = 8
    seed: int = 1
    rate: float | None = None
    """A learning rate that is tried; by default the chosen one."""

    @property
    def learning_rate(self) -> float:
        """The one that is used."""
        return self.rate or CHOSEN.get((self.method, self.collection), 3e-4)

    @property
    def name(self) -> str:
        """Name of its folder."""
        rate = f"-lr{self.rate:g}" if self.rate else ""
        return f"{self.collection}-{self.method}-{self.modules}-r{self.rank}{rate}-seed{self.seed}"

    @property
    def kept(self) -> bool:
        """Whether states of several steps are kept, for the study of checkpoints."""
        return self.rank == 8 and self.modules == "all" and self.rate is None


@dataclass(frozen=True)
class Asked:
    """One study, of cells that are trained first."""

    study: str
    cells: tuple[Cell, ...]


def rates(collection: str, method: str) -> Iterator[Cell | Asked]:
    """Yield the learning rates that are compared on dev."""
    for rate in RATES:
        yield Cell(collection, method, rate=rate)


def ranks(collection: str, method: str) -> Iterator[Cell | Asked]:
    """Yield all ranks, and their study."""
    cells = tuple(Cell(collection, method, rank=rank, seed=seed) for seed in SEEDS for rank in RANKS)
    yield from cells
    yield Asked("ranks", cells)


def components(collection: str, method: str) -> Iterator[Cell | Asked]:
    """Yield attention alone and the MLP alone, at one rank and at one budget, and their study beside both."""
    cells = [Cell(collection, method, seed=seed) for seed in SEEDS]
    for seed in SEEDS:
        for modules, equal in EQUAL.items():
            cells += [Cell(collection, method, modules, rank, seed) for rank in (8, equal)]
    yield from cells
    yield Asked("components", tuple(cells))


def _of_rank_8(study: str, collection: str, method: str) -> Iterator[Cell | Asked]:
    cells = tuple(Cell(collection, method, seed=seed) for seed in SEEDS)
    yield from cells
    yield Asked(study, cells)


def layers(collection: str, method: str) -> Iterator[Cell | Asked]:
    """Yield the study of layers."""
    yield from _of_rank_8("layers", collection, method)


def projections(collection: str, method: str) -> Iterator[Cell | Asked]:
    """Yield the study of projections."""
    yield from _of_rank_8("projections", collection, method)


def checkpoints(collection: str, method: str) -> Iterator[Cell | Asked]:
    """Yield the study of steps."""
    yield from _of_rank_8("checkpoints", collection, method)


PARTS = {
    "rates": rates,
    "components": components,
    "layers": layers,
    "projections": projections,
    "ranks": ranks,
    "checkpoints": checkpoints,
}
