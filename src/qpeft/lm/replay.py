"""Runs of a decoder that agree in their first layers: what these gave is kept, and not computed again.

Two settings of a model that differ from layer l on have the same states up to there. So the second run starts at
layer l, from what layer l − 1 gave in the first. Everything else of the model (embeddings, masks, last norm, head)
runs as always, which is why this works for whatever is read out at the end.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from qpeft.errors import ModelError
from qpeft.lm.depth import Layers


class Replay:
    """What layers gave in earlier runs, call by call.

    A run may call the model several times (batches), in any order and from several threads. What belongs together is
    told by what enters the first layer, to the bit: the runs of one replay have the same inputs.

    Args:
        layers: the model's.

    Attributes:
        computed: layers that were run, counted over all calls.
        spared: those whose states were taken from an earlier run.
    """

    def __init__(self, layers: Layers) -> None:
        self._modules = list(layers.modules)
        self._kept: dict[int, dict[int, Any]] = {}
        self._entered: list[Tensor] = []
        self._lock = threading.Lock()
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
        self._kept |= {depth: {} for depth in keep if depth > shared}
        run = _Run(self, shared)
        before = [vars(module).get("forward") for module in self._modules]
        try:
            for index, module in enumerate(self._modules):
                module.forward = run.layer(index, module.forward)
            yield
        finally:
            for module, forward in zip(self._modules, before, strict=True):
                if forward is None:
                    del module.forward
                else:  # a library that dispatches a model over devices has put its own there
                    module.forward = forward
        if run.calls != len(self._entered):
            raise ModelError(f"the model was called {run.calls} times, and {len(self._entered)} times before")

    def call(self, shared: int, entered: Tensor) -> int:
        """Return the number of the call with these states before the first layer; a first run's calls are new."""
        with self._lock:
            if not shared:
                self._entered.append(entered)
                return len(self._entered) - 1
            for number, known in enumerate(self._entered):
                if known.shape == entered.shape and torch.equal(known, entered):
                    return number
        raise ModelError("the model is called with other inputs than in the run whose states were kept")

    def count(self, computed: int, spared: int) -> None:
        """Count layers."""
        with self._lock:
            self.computed += computed
            self.spared += spared

    def keep(self, depth: int, call: int, states: Any) -> None:
        """Keep what a layer gave, where that is asked for."""
        if depth in self._kept:
            self._kept[depth][call] = states

    def kept(self, depth: int, call: int) -> Any:
        """Return what was kept."""
        return self._kept[depth][call]


class _Run:
    """One run: what its layers do instead. Each thread is within a call of its own."""

    def __init__(self, replay: Replay, shared: int) -> None:
        self._replay, self._shared = replay, shared
        self._own = threading.local()
        self._lock = threading.Lock()
        self.calls = 0

    def layer(self, index: int, forward: Any) -> Any:
        replay, shared, own = self._replay, self._shared, self._own

        def run(*args: Any, **kwargs: Any) -> Any:
            if index == 0:
                if kwargs.get("past_key_values") is not None:
                    raise ModelError("states are not shared over stored contexts")
                own.call = replay.call(shared, args[0] if args else kwargs["hidden_states"])
                with self._lock:
                    self.calls += 1
            if index < shared:
                replay.count(0, 1)
                return replay.kept(shared, own.call)
            out = forward(*args, **kwargs)
            replay.count(1, 0)
            replay.keep(index + 1, own.call, out)
            return out

        return run
