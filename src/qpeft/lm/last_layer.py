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
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from qpeft.lm import cpu_attention
from qpeft.lm.agreement import agree
from qpeft.lm.context_store import Filled
from qpeft.lm.depth import Layers

KERNELS = (cpu_attention.NAME, "sdpa", "eager")
"""Attention that takes a mask for every pair of positions."""
CACHES = ("past_key_values", "layer_past")
"""What layers call the cache."""
MULTIPLE = 8
"""As many positions of a row are computed, or a multiple: on CPUs a kernel is compiled for every shape that is new."""
TRIED = 16
"""Positions of the rows that it is tried with."""
_KNOWN = {"hidden_states", "attention_mask", "position_ids", "position_embeddings"}


class LastLayer:
    """A model's last layer, as it is, or within a context only where it is told to go on.

    Each thread has positions of its own. For forward passes over whole rows, without a cache.
    """

    def __init__(self, layers: Layers) -> None:
        self._layers = layers
        self._stand_in = _StandIn(layers.modules[-1])
        self._lock = threading.Lock()
        self._users = 0
        self._replaced = ExitStack()

    @torch.no_grad()
    def works(self, model: Any) -> bool:
        """Whether a model's last states are the same with this as without; tried with two rows of unlike lengths.

        Attention that makes a mask by itself, for as many positions as it is given, would take those that count for the
        last ones.
        """
        ids = torch.arange(10, 10 + 2 * TRIED, device=model.device) % model.config.get_text_config().vocab_size
        positions = torch.arange(TRIED, device=model.device)[None]
        inputs = {"input_ids": ids.view(2, TRIED), "position_ids": positions, "use_cache": False}
        wanted = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
        wanted[0, 3] = wanted[1, TRIED - 2] = True
        try:
            whole = model.base_model(**inputs).last_hidden_state
            with self.only_at(wanted):
                some = model.base_model(**inputs).last_hidden_state
        except Exception:  # a layer that takes its arguments otherwise, whatever that ends in
            return False
        return agree(whole[wanted], some[wanted], model)

    @contextmanager
    def only_at(self, wanted: Tensor) -> Iterator[None]:
        """Let the last layer go on, within this context, at the positions `wanted` `[B, S]`; elsewhere it gives 0.

        A layer that is given more than is understood here, or keeps nothing in a cache, is computed as ever.
        """
        self._stand_in.positions.wanted = wanted
        with self._lock:
            if not self._users:
                self._replaced.enter_context(self._layers.ending_in(self._stand_in))
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    self._replaced.close()


class _StandIn:
    """Stands in the place of a layer; no module, so that nothing of the model is registered twice."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer
        self.positions = threading.local()
        self._signature = inspect.signature(layer.forward)
        self._cache = next((name for name in CACHES if name in self._signature.parameters), CACHES[0])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = self._signature.bind(*args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        if not self._understood(given):
            return self._layer(*args, **kwargs)
        states = given.pop("hidden_states")
        memory = {self._cache: _Memory()}
        try:
            return self._layer(states, **given | memory)
        except Filled:
            places = _Places.of(self.positions.wanted)
        some = {name: places.choose(name, value) for name, value in given.items()}
        some["attention_mask"] = places.mask(given.get("attention_mask"), states.shape[1])
        out = self._layer(places.of_states(states), **some | memory)
        return (places.put(out[0]), *out[1:]) if isinstance(out, tuple) else places.put(out)

    def _understood(self, given: dict[str, Any]) -> bool:
        tensors = {name for name, value in given.items() if isinstance(value, (Tensor, tuple, list, Cache))}
        checkpointed = getattr(self._layer, "gradient_checkpointing", False)
        return tensors <= _KNOWN and not checkpointed


@dataclass(frozen=True, slots=True)
class _Places:
    """The positions that count, `wanted` `[B, S]`: places `order` `[B, K]`, of which those count that are `real`."""

    wanted: Tensor
    order: Tensor
    real: Tensor

    @classmethod
    def of(cls, wanted: Tensor) -> _Places:
        counts = wanted.sum(1, keepdim=True)
        most = -(-int(counts.max()) // MULTIPLE) * MULTIPLE
        order = torch.argsort(wanted.int(), dim=1, descending=True, stable=True)[:, :most]
        real = torch.arange(order.shape[1], device=wanted.device) < counts
        return cls(wanted, torch.where(real, order, order[:, :1]), real)  # what fills up a row is computed and dropped

    def choose(self, name: str, value: Any) -> Any:
        """Return what belongs to the positions of an argument of a layer."""
        if value is None or name not in ("position_embeddings", "position_ids"):
            return value
        return tuple(map(self.of_states, value)) if isinstance(value, tuple | list) else self.of_states(value)

    def of_states(self, values: Tensor) -> Tensor:
        """Return `[B, K, …]` of values `[B or 1, S, …]`."""
        rows = torch.arange(len(self.order), device=values.device)[:, None]
        return values.expand(len(self.order), *values.shape[1:])[rows, self.order]

    def mask(self, mask: Tensor | None, positions: int) -> Tensor:
        """Return the rows of a mask, `[B, 1, K, S]`; without a mask, each sees itself and what stands before it."""
        if mask is not None:
            return self.of_states(mask.transpose(1, 2)).transpose(1, 2)
        return (torch.arange(positions, device=self.order.device) <= self.order[..., None])[:, None]

    def put(self, states: Tensor) -> Tensor:
        """Return states `[B, K, d]` at their positions, `[B, S, d]`."""
        whole = states.new_zeros(*self.wanted.shape, states.shape[-1])
        return whole.masked_scatter(self.wanted[..., None], states[self.real])


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
