"""Runs of a decoder that agree in their first layers: what these gave is kept, and not computed again.

Two settings of a model that differ from layer l on have the same states up to there. So the second run starts at
layer l, from what layer l − 1 gave in the first. Everything else of the model (embeddings, masks, last norm, head)
runs as always, which is why this works for whatever is read out at the end.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from qpeft.depth import Layers
from qpeft.errors import ModelError


class Replay:
    """What layers gave in earlier runs, call by call.

    A run may call the model several times (batches); the runs of one replay make the same calls with the same inputs.
    That they do is checked at what enters the first layer, to the bit.

    Args:
        layers: the model's.

    Attributes:
        computed: layers that were run, counted over all calls.
        spared: those whose states were taken from an earlier run.
    """

    def __init__(self, layers: Layers) -> None:
        self._modules = list(layers.modules)
        self._kept: dict[int, list[Any]] = {}
        self._entered: list[Tensor] = []
        self.computed = 0
        self.spared = 0

    @contextmanager
    def run(self, shared: int = 0, keep: Collection[int] = ()) -> Iterator[None]:
        """Let the first `shared` layers give what they gave, within this context, and the others run.

        Args:
            shared: how many of the first layers are as they were; the state behind them must have been kept. At 0 a
                new replay begins, and what was kept is forgotten.
            keep: numbers of layers behind which states are kept for later runs.

        Raises:
            ModelError: the model is called with other inputs than in the first run, or over stored contexts; or
                nothing was kept behind so many layers.
        """
        if shared and shared not in self._kept:
            raise ModelError(f"no states were kept behind {shared} layers")
        if not shared:
            self._entered = []
        self._kept = {depth: states for depth, states in self._kept.items() if depth <= shared}
        self._kept |= {depth: [] for depth in keep if depth > shared}
        calls = _Calls(self, shared)
        before = [vars(module).get("forward") for module in self._modules]
        try:
            for index, module in enumerate(self._modules):
                module.forward = calls.layer(index, module.forward)
            yield
        finally:
            for module, forward in zip(self._modules, before, strict=True):
                if forward is None:
                    del module.forward
                else:  # a library that dispatches a model over devices has put its own there
                    module.forward = forward
        if shared and calls.number != len(self._entered):
            raise ModelError(f"the model was called {calls.number} times, and {len(self._entered)} times before")

    def check(self, number: int, shared: int, entered: Tensor) -> None:
        """Note what enters the first layer in the n-th call (from 0), or compare it with the first run's."""
        if not shared:
            self._entered.append(entered)
        elif number >= len(self._entered) or not torch.equal(entered, self._entered[number]):
            raise ModelError("the model is called with other inputs than in the run whose states were kept")


class _Calls:
    """One run: wraps the layers, and counts the calls of the model."""

    def __init__(self, replay: Replay, shared: int) -> None:
        self._replay, self._shared = replay, shared
        self.number = 0

    def layer(self, index: int, forward: Any) -> Any:
        replay, shared = self._replay, self._shared

        def run(*args: Any, **kwargs: Any) -> Any:
            if index == 0:
                if kwargs.get("past_key_values") is not None:
                    raise ModelError("states are not shared over stored contexts")
                replay.check(self.number, shared, _states(args, kwargs))
                self.number += 1
            if index < shared:
                replay.spared += 1
                return replay._kept[shared][self.number - 1]
            replay.computed += 1
            out = forward(*args, **kwargs)
            if index + 1 in replay._kept:
                replay._kept[index + 1].append(out)
            return out

        return run


def _states(args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    """Return the hidden states among a layer's arguments, `[B, T, d]`."""
    states: Tensor = args[0] if args else kwargs["hidden_states"]
    return states
