"""What is trained, and what is asked of it.

Every setting that could be chosen was chosen on dev (rates); test is read by the studies alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

SEEDS = (1, 2, 3)
RANKS = (1, 2, 8, 32)
RATES = (1e-4, 3e-4, 1e-3, 3e-3)
"""Learning rates that are compared on dev, at rank 8 and seed 1."""
AGAIN = {("yes_no", "reddit-shift"): (1e-3, 2e-3, 3e-3), ("yes_no", "squad"): (1e-3, 3e-3)}
"""(method, collection) → rates that are compared with all seeds, where seed 1 alone did not decide."""
AROUND = (1e-3, 3e-3)
"""Rates that other losses of a method are tried at, beside the one that was chosen for its own."""
CHOSEN: dict[tuple[str, ...], float] = {
    ("query_likelihood", "reddit-shift"): 1e-3,
    ("query_likelihood", "squad"): 1e-4,
    ("yes_no", "reddit-shift"): 2e-3,
    ("yes_no", "squad"): 3e-3,
    ("yes_no", "squad", "sft"): 1e-3,
}
"""(method, collection) → learning rate, where dev chose another than 3e-4; with a loss, its own."""
COLLECTIONS = ("reddit-shift", "squad")
LOSSES = {"query_likelihood": "both", "classifier": "softmax", "yes_no": "softmax"}
COMPARED = {"yes_no": ("softmax", "cross_entropy", "sft")}
"""method → losses that are compared: contrastive, of each pair by itself, and fine-tuning on the answer's token."""
FLOAT32 = {("query_likelihood", "reddit-shift")}
"""(method, collection) whose model computes in float32, in training and study; it is bfloat16 for the others."""
TEMPLATES = {"classifier": "passage_first"}
"""method → template, where it is not the method's own: tiny-lm knows queries behind passages (docs/rerankers.md)."""
RANK = 8
"""Of all trainings but those that ask for rank."""
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
GRID = STUDY | {"depth": 5, "limit-queries": 100}
"""Of that with an ablation per layer and projection: 72 more than DETAIL's on tiny-lm, at a quarter of the pairs."""


@dataclass(frozen=True)
class Cell:
    """One training."""

    collection: str
    method: str
    modules: str = "all"
    rank: int = RANK
    seed: int = 1
    rate: float | None = None
    """A learning rate that is tried; by default the chosen one."""
    another_loss: str | None = None
    """One that is compared with the method's own."""

    @property
    def learning_rate(self) -> float:
        """The one that is used."""
        own = (self.method, self.collection, self.loss)
        return self.rate or CHOSEN.get(own) or CHOSEN.get(own[:2], 3e-4)

    @property
    def name(self) -> str:
        """Name of its folder."""
        tried = (f"-lr{self.rate:g}" if self.rate else "") + (f"-{self.another_loss}" if self.another_loss else "")
        return f"{self.collection}-{self.method}-{self.modules}-r{self.rank}{tried}-seed{self.seed}"

    @property
    def loss(self) -> str:
        """What it is trained with."""
        return self.another_loss or LOSSES[self.method]

    @property
    def dtype(self) -> str:
        """Numbers that the model computes in, whatever is quicker on a machine."""
        return "float32" if (self.method, self.collection) in FLOAT32 else "bfloat16"

    @property
    def kept(self) -> bool:
        """Whether states of several steps are kept, for the study of checkpoints."""
        return self.rank == RANK and self.modules == "all" and self.rate is None and self.another_loss is None


@dataclass(frozen=True)
class Asked:
    """One study, of cells that are trained first."""

    part: str
    cells: tuple[Cell, ...]

    @property
    def study(self) -> list[str]:
        """The verb of `qpeft analyze`, and what it takes besides."""
        return ["projections", "--grid"] if self.part == "grid" else [self.part]

    @property
    def options(self) -> Mapping[str, object]:
        """What is ranked."""
        return {"layers": DETAIL, "projections": DETAIL, "grid": GRID}.get(self.part, STUDY)

    @property
    def name(self) -> str:
        """Name of its folder and of its result."""
        return f"{self.cells[0].collection}-{self.cells[0].method}-{self.part}"


@dataclass(frozen=True)
class Scope:
    """What a part is asked of; `equal` are the ranks at which one component has the parameters of both at `RANK`."""

    collection: str
    method: str
    equal: Mapping[str, int]


def equal_ranks(model: str) -> dict[str, int]:
    """Return these ranks for a model, from its shapes: tiny-lm's are 18 (attention) and 14 (MLP)."""
    from qpeft.adapters import lora
    from qpeft.loading import load_lm
    from qpeft.model_config import ModelConfig

    places = lora.build(lora.Config(r=1), load_lm(ModelConfig(model))).places()
    parameters = {
        component: sum(count for place, count in places.items() if place.component == component)
        for component in ("attention", "mlp")
    }
    return {component: round(RANK * sum(parameters.values()) / own) for component, own in parameters.items()}


def tried(method: str, collection: str, loss: str | None = None) -> dict[float, list[Cell]]:
    """Return the trainings that show on dev what learning rates do: rate → cells.

    Args:
        method: of the reranker.
        collection: that is trained on.
        loss: one that is compared with the method's own; it is tried around the rate that was chosen for that.
    """
    cell = partial(Cell, collection, method, another_loss=loss)
    if loss is not None:
        chosen = cell().learning_rate
        found = {rate: [cell(rate=rate)] for rate in AROUND}
        found[chosen] = [*found.get(chosen, [cell()]), *(cell(seed=seed) for seed in SEEDS[1:])]
        return found
    again = AGAIN.get((method, collection), ())
    seeds = {rate: SEEDS if rate in again else SEEDS[:1] for rate in sorted({*RATES, *again})}
    return {rate: [cell(seed=seed, rate=rate) for seed in own] for rate, own in seeds.items()}


def other_losses(method: str) -> list[str]:
    """Return what a method's own loss is compared with."""
    return [loss for loss in COMPARED.get(method, ()) if loss != LOSSES[method]]


def rates(scope: Scope) -> Iterator[Cell | Asked]:
    """Yield the learning rates that are compared on dev."""
    for loss in (None, *other_losses(scope.method)):
        for cells in tried(scope.method, scope.collection, loss).values():
            yield from (cell for cell in cells if cell.rate is not None)


def ranks(scope: Scope) -> Iterator[Cell | Asked]:
    """Yield all ranks, and their study."""
    cells = tuple(Cell(scope.collection, scope.method, rank=rank, seed=seed) for seed in SEEDS for rank in RANKS)
    yield from cells
    yield Asked("ranks", cells)


def components(scope: Scope) -> Iterator[Cell | Asked]:
    """Yield attention alone and the MLP alone, at one rank and at one budget, and their study beside both."""
    cells = [Cell(scope.collection, scope.method, seed=seed) for seed in SEEDS]
    for seed in SEEDS:
        for modules, equal in scope.equal.items():
            cells += [Cell(scope.collection, scope.method, modules, rank, seed) for rank in (RANK, equal)]
    yield from cells
    yield Asked("components", tuple(cells))


def losses(scope: Scope) -> Iterator[Cell | Asked]:
    """Yield the losses that a method's own is compared with, and their study; nothing where there are none."""
    cells = [
        Cell(scope.collection, scope.method, seed=seed, another_loss=loss)
        for loss in ((None, *other_losses(scope.method)) if scope.method in COMPARED else ())
        for seed in SEEDS
    ]
    if cells:
        yield from cells
        yield Asked("losses", tuple(cells))


def _of_one_rank(part: str, scope: Scope) -> Iterator[Cell | Asked]:
    cells = tuple(Cell(scope.collection, scope.method, seed=seed) for seed in SEEDS)
    yield from cells
    yield Asked(part, cells)


PARTS = {
    "rates": rates,
    "components": components,
    "layers": partial(_of_one_rank, "layers"),
    "projections": partial(_of_one_rank, "projections"),
    "ranks": ranks,
    "checkpoints": partial(_of_one_rank, "checkpoints"),
    "losses": losses,
    "grid": partial(_of_one_rank, "grid"),
}
