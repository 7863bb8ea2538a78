"""The last layer of a decoder, computed only where its result is read.

A state behind the last layer counts where it predicts a scored token. Of all other positions that layer owes its keys
and values, and nothing more: no attention, no output projection, no feed-forward network. Where the scored tokens are
the few of a query behind a long passage, that is nearly the whole layer: a sixth of a model of six layers.

The layer is called twice, as it stands: once with the states of all positions, until it has made its keys and values;
then with the states of the positions that count, over those keys and values.

Shapes: `B` rows, `S` positions, `K` positions of a row that count at most, `d` hidden size.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from qpeft import cpu_attention
from qpeft.context_store import Filled
from qpeft.depth import Layers

KERNELS = (cpu_attention.NAME, "sdpa", "eager")
"""Attention that takes a mask for every pair of positions."""
CACHES = ("past_key_values", "layer_past")
"""What layers call the cache."""
_KNOWN = {"hidden_states", "attention_mask", "position_ids", "position_embeddings"}


@contextmanager
def only_at(layers: Layers, wanted: Tensor) -> Iterator[None]:
    """Let a model compute its last layer, within this context, at the positions `wanted` `[B, S]`; elsewhere it is 0.

    For forward passes over whole rows, without a cache. Layers that are given more than is understood here are computed
    as ever.
    """
    with layers.ending_in(_Only(layers.modules[-1], wanted)):
        yield


class _Only:
    """Stands in the place of a layer; no module, so that nothing of the model is registered twice."""

    def __init__(self, layer: nn.Module, wanted: Tensor) -> None:
        self._layer = layer
        self._wanted = wanted
        self._signature = inspect.signature(layer.forward)
        self._cache = next((name for name in CACHES if name in self._signature.parameters), CACHES[0])
        counts = wanted.sum(1)
        width = int(counts.max())
        order = torch.argsort(wanted.int(), dim=1, descending=True, stable=True)[:, :width]
        self._real = torch.arange(width, device=wanted.device) < counts[:, None]
        self._places = torch.where(self._real, order, order[:, :1])  # what fills up a row is computed and dropped

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = self._signature.bind(*args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        given = {name: value for name, value in given.items() if value is not None}
        if not self._understood(given):
            return self._layer(*args, **kwargs)
        states = given.pop("hidden_states")
        memory = {self._cache: _Memory()}
        try:
            return self._layer(states, **given | memory)  # a layer that keeps nothing in a cache has done its work
        except Filled:
            pass
        some = {name: self._choose(name, value) for name, value in given.items()}
        some["attention_mask"] = self._mask(given.get("attention_mask"), states)
        out = self._layer(self._at(states), **some | memory)
        whole = torch.zeros_like(states)
        found = out[0] if isinstance(out, tuple) else out
        whole = whole.masked_scatter(self._wanted[..., None], found[self._real])
        return (whole, *out[1:]) if isinstance(out, tuple) else whole

    def _understood(self, given: dict[str, Any]) -> bool:
        tensors = {name for name, value in given.items() if isinstance(value, (Tensor, tuple, list, Cache))}
        checkpointed = getattr(self._layer, "gradient_checkpointing", False)
        return tensors <= _KNOWN and not checkpointed

    def _choose(self, name: str, value: Any) -> Any:
        if name == "position_embeddings":
            return tuple(map(self._at, value))
        return self._at(value) if name == "position_ids" else value

    def _at(self, values: Tensor) -> Tensor:
        """Return `[B, K, …]` of values `[B or 1, S, …]`."""
        rows = torch.arange(len(self._places), device=values.device)[:, None]
        return values.expand(len(self._places), *values.shape[1:])[rows, self._places]

    def _mask(self, mask: Tensor | None, states: Tensor) -> Tensor:
        """Return the mask of the positions that count, `[B, 1, K, S]`; without one, all see what stands before them."""
        if mask is not None:
            return self._at(mask.transpose(1, 2)).transpose(1, 2)
        before = torch.arange(states.shape[1], device=states.device) <= self._places[..., None]
        return before[:, None]


class _Memory(Cache):
    """A cache of one layer, whichever it is: takes its keys and values and ends the pass, and then only gives them."""

    def __init__(self) -> None:
        super().__init__(layers=[DynamicLayer()])  # type: ignore[no-untyped-call]
        self._kept: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return keys and values of all positions.

        Raises:
            Filled: they are there now.
        """
        if self._kept is None:
            self._kept = key_states, value_states
            raise Filled
        return self._kept
