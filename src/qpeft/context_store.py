"""Contexts encoded once: keys and values of everything that stands before the hint or the query.

In a decoder they do not depend on what follows, and the model is frozen. So a passage that is a candidate of many
queries, or a training passage that is read in every epoch and under every adapter, is encoded the first time and kept:

    [BOS] Passage: …  |  hint · rest of the context · cue · query
    kept, per passage    computed, per pair

Each context is encoded alone and unpadded, so that what is kept is the same in whatever order contexts come, and work
that was interrupted and starts again with an empty store gives the same bits.

Shapes: `T` context positions, `H` heads, `h` head size, `d` hidden size.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.cache_utils import DynamicLayer


@dataclass(frozen=True, slots=True)
class Encoded:
    """What a model keeps of a context: keys and values `[layers, 2, H, T, h]`, and states `[T, d]` if asked for."""

    cache: Tensor
    states: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.cache.nbytes + (0 if self.states is None else self.states.nbytes)


Key = tuple[tuple[int, ...], int | None, int]
"""Token ids of the context, which layer's states were asked for, and how many layers were run."""


class ContextStore:
    """A least-recently-used store of encoded contexts in memory; what falls out may go to disk.

    Args:
        capacity: bytes that may be kept in memory; 0 keeps nothing.
        folder: where contexts go that do not fit; it must belong to one model and number type. None: they are encoded
            again when needed.
    """

    def __init__(self, capacity: int, folder: Path | None = None) -> None:
        self.capacity = capacity
        self.folder = folder
        self._kept: OrderedDict[Key, Encoded] = OrderedDict()
        self.bytes_kept = 0
        self.hits = 0
        self.misses = 0

    def get(self, key: Key, encode: Callable[[], Encoded]) -> Encoded:
        """Return the encoded context, from memory, from disk, or by encoding it."""
        kept = self._kept.get(key)
        if kept is not None:
            self.hits += 1
            self._kept.move_to_end(key)
            return kept
        found = self._read(key)
        if found is None:
            self.misses += 1
            found = encode()
        else:
            self.hits += 1
        self._keep(key, found)
        return found

    def _keep(self, key: Key, encoded: Encoded) -> None:
        if encoded.nbytes > self.capacity:
            self._write(key, encoded)
            return
        self._kept[key] = encoded
        self.bytes_kept += encoded.nbytes
        while self.bytes_kept > self.capacity:
            oldest, dropped = self._kept.popitem(last=False)
            self.bytes_kept -= dropped.nbytes
            self._write(oldest, dropped)

    def _path(self, key: Key) -> Path | None:
        if self.folder is None:
            return None
        return self.folder / f"{hashlib.sha256(repr(key).encode()).hexdigest()}.safetensors"

    def _read(self, key: Key) -> Encoded | None:
        path = self._path(key)
        if path is None or not path.is_file():
            return None
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError):
            return None  # a damaged file costs an encoding, no more
        return Encoded(tensors["cache"], tensors.get("states"))

    def _write(self, key: Key, encoded: Encoded) -> None:
        path = self._path(key)
        if path is None or path.exists():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {"cache": encoded.cache.cpu()}
        if encoded.states is not None:
            tensors["states"] = encoded.states.cpu()
        temporary = path.with_suffix(".tmp")
        save_file(tensors, temporary)
        temporary.replace(path)


class FilledLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A layer of a cache that holds its contexts, and takes what follows: into room left for it, or by growing.

    Writing in place is quicker, but backpropagation needs what was there, so training grows.
    """

    def __init__(self, keys: Tensor, values: Tensor, past: int, *, grows: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lazy_initialization(keys, values)
        self.keys = self._keys = keys
        self.values = self._values = values
        self._past = past
        self._grows = grows

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return the layer's keys and values with new ones behind them."""
        if self._grows:
            return torch.cat([self._keys, key_states], -2), torch.cat([self._values, value_states], -2)
        self._keys[:, :, self._past :] = key_states
        self._values[:, :, self._past :] = value_states
        return self._keys, self._values

    def get_seq_length(self) -> int:
        """Return how many positions stand before the input."""
        return self._past


class Filled(Exception):  # noqa: N818 — raised when all is well
    """The last layer's keys and values are there: what the model would compute after them, nobody reads."""


class LastLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """The last layer of a cache that is filled; ends the forward pass once it is."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keep keys and values, and raise `Filled`."""
        super().update(key_states, value_states, *args, **kwargs)
        raise Filled


def filled_layers(count: int) -> list[DynamicLayer]:
    """Return the empty layers of a cache whose filling ends with `Filled`."""
    layers = [DynamicLayer() for _ in range(count - 1)]  # type: ignore[no-untyped-call]
    return [*layers, LastLayer()]  # type: ignore[no-untyped-call]
