"""Several processes that train one adapter together, each with a device of its own, as `torchrun` starts them.

Each has the whole frozen model, and a part of every step's queries and of dev; gradients are averaged. The first one
alone writes and speaks. A step of n processes is one of n times the gradient accumulation of one process, but for the
last one: where batches do not divide by n, accelerate fills it up with the first ones.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from qpeft.errors import OptionError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun tells each of several processes, beside WORLD_SIZE, their number."""
OTHERS = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""By these other launchers tell a process how many there are."""
MORE = tuple(f"ACCELERATE_{name}" for name in ("MIXED_PRECISION", "USE_FSDP", "USE_DEEPSPEED", "DYNAMO_BACKEND"))
"""By these `accelerate launch` has the Trainer compute otherwise: it would cast, split or compile what is trained."""


@dataclass(frozen=True)
class Processes:
    """Which of how many processes this one is; `local` counts those of its machine."""

    rank: int = 0
    local: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this one writes and speaks."""
        return self.rank == 0

    def device(self, name: str) -> str:
        """Return the device of this process: of several, `auto` and `cuda` are a GPU of its own where there are any."""
        import torch

        own = self.count > 1 and (name == "cuda" or (name == "auto" and torch.cuda.is_available()))
        return f"cuda:{self.local}" if own else name


def processes() -> Processes:
    """Return what the launcher told, if there was one.

    Raises:
        OptionError: it was another than torchrun, so that each would train all by itself, and write over the others; or
            it asks for more than several processes.
    """
    for name in MORE:
        if os.environ.get(name, "no").lower() not in ("", "no", "false", "0"):
            raise OptionError(f"{name} is {os.environ[name]}: start training without a launcher, or with torchrun")
    count = _number("WORLD_SIZE")
    other = next((name for name in OTHERS if _number(name) > max(count, 1)), None)
    if count <= 1 and other is None:
        return Processes()
    missing = [name for name in NEEDED if not os.environ.get(name)]
    if other is not None or missing:
        told = f"{other} is {os.environ[other]}" if other else f"WORLD_SIZE is {count} and {missing[0]} is missing"
        raise OptionError(f"{told}: start training without a launcher, or with torchrun")
    return Processes(_number("RANK"), _number("LOCAL_RANK"), count)


@contextmanager
def together(device: torch.device) -> Iterator[None]:
    """Meet the other processes, if there are any; none goes on before all have come to the end.

    What was made of the Trainer must be out of reach by then.
    """
    from torch import cuda, distributed

    if processes().count == 1:
        yield
        return
    if device.type == "cuda":
        cuda.set_device(device)  # by way of the current one objects are gathered, and at first it is the same for all
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
        # Whatever averages gradients holds the group too. Were it the last, it would wait for the group's threads with
        # the interpreter locked, and one of them for the interpreter; by itself, the group waits without the lock.
        gc.collect()
        distributed.barrier()
    finally:
        distributed.destroy_process_group()


def share(items: Sequence[T]) -> Sequence[T]:
    """Return those of some items that are this process's part; all if it is alone."""
    own = processes()
    return items[own.rank :: own.count]


def gathered(part: Sequence[T]) -> list[T]:
    """Return the items of all processes' parts in their order; `part` is what this one made of its `share`."""
    count = processes().count
    if count == 1:
        return list(part)
    from torch import distributed

    parts: list[Sequence[T]] = [()] * count
    distributed.all_gather_object(parts, part)
    return [parts[place % count][place // count] for place in range(sum(map(len, parts)))]


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdigit() else 0
