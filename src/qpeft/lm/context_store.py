"""Contexts encoded once: keys and values of everything that stands before the hint or the query.

In a decoder they do not depend on what follows, and the model is frozen. So a passage that is a candidate of many
queries, or a training passage that is read in every epoch and under every adapter, is encoded the first time and kept:

    [BOS] Passage: …  |  hint · rest of the context · cue · query
    kept, per passage    computed, per pair

On a CPU, each context that is kept is encoded in a batch whose shape follows from its own length, so that it is the
same in whatever order contexts come, and work that was interrupted and starts again with an empty store gives the same
bits.

Shapes: `T` context positions, `H` heads, `h` head size, `d` hidden size.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from qpeft.atomic import replacing
from qpeft.errors import InputError


@dataclass(frozen=True, slots=True)
class Encoded:
    """What a model keeps of a context: keys and values `[layers, 2, H, T, h]`, and states `[T, d]` if asked for."""

    cache: Tensor
    states: Tensor | None = None

    def to(self, device: torch.device) -> Encoded:
        """Return the same on a device: what was read from disk is not where the model is."""
        if self.cache.device == device:
            return self
        return Encoded(self.cache.to(device), None if self.states is None else self.states.to(device))


Key = tuple[tuple[int, ...], int | None, int]
"""Token ids of the context, which layer's states were asked for, and how many layers were run."""

Storage = Literal["exact", "int8", "fp8"]
EIGHT_BITS = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}
"""Type and largest number of what is kept in 8 bits."""


@dataclass(frozen=True, slots=True)
class Packed:
    """An encoded context as it is kept: `numbers` as `Encoded.cache`.

    In 8 bits they are to be multiplied by `scales` `[layers, 2, H, T, 1]`, one for each head and position, so that a
    position with large numbers does not spoil the others.
    """

    numbers: Tensor
    scales: Tensor | None = None
    states: Tensor | None = None

    @classmethod
    def of(cls, encoded: Encoded, storage: Storage) -> Packed:
        """Pack an encoded context."""
        if storage == "exact":
            return cls(encoded.cache, None, encoded.states)
        kind, largest = EIGHT_BITS[storage]
        exact = encoded.cache.float()
        scales = (exact.abs().amax(-1, keepdim=True) / largest).clamp(min=torch.finfo(torch.float16).tiny)
        scales = scales.to(encoded.cache.dtype)
        numbers = exact / scales.float()
        if not kind.is_floating_point:
            numbers = numbers.round()
        return cls(numbers.clamp(-largest, largest).to(kind), scales, encoded.states)

    def unpack(self) -> Encoded:
        """Return the context as the model needs it."""
        if self.scales is None:
            return Encoded(self.numbers, self.states)
        return Encoded(self.numbers.to(self.scales.dtype) * self.scales, self.states)

    def tensors(self) -> dict[str, Tensor]:
        """Return what is kept, by name."""
        named = {"cache": self.numbers, "scales": self.scales, "states": self.states}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def nbytes(self) -> int:
        """Bytes of all."""
        return sum(tensor.nbytes for tensor in self.tensors().values())


class ContextStore:
    """A least-recently-used store of encoded contexts in memory; what falls out may go to disk.

    Args:
        capacity: bytes that may be kept in memory; 0 keeps nothing.
        folder: where contexts go that do not fit; it must belong to one model, number type and kind of storage. None:
            they are encoded again when needed.
        storage: `int8` and `fp8` take about half the room of 16-bit numbers, and change scores a little.

    Attributes:
        token_bytes: what a token takes; 0 until the first context comes.
    """

    def __init__(self, capacity: int, folder: Path | None = None, storage: Storage = "exact") -> None:
        self.capacity = capacity
        self.storage = storage
        self.folder = folder
        self._kept: OrderedDict[Key, Packed] = OrderedDict()
        self._put: set[Key] = set()
        self.bytes_kept = 0
        self.token_bytes = 0
        self.hits = 0
        self.misses = 0
        self._lock = threading.Lock()
        self._begun: dict[Key, Future[Packed]] = {}

    @property
    def folder(self) -> Path | None:
        """Where contexts go that do not fit; it is made as soon as it is named, so that a wrong one shows early.

        Raises:
            InputError: it cannot be made.
        """
        return self._folder

    @folder.setter
    def folder(self, folder: Path | None) -> None:
        try:
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"passage cache {str(folder)!r} cannot be made: {error.strerror}") from error
        self._folder = folder

    def get(self, key: Key, encode: Callable[[], Encoded]) -> Encoded:
        """Return the encoded context, from memory, from disk, or by encoding it; always as it is kept.

        Threads may call it; what one of them encodes, the others wait for.
        """
        with self._lock:
            kept = self._kept.get(key)
            if kept is not None:
                self._count(key, hit=True)
                self._kept.move_to_end(key)
                return kept.unpack()
            begun = self._begun.get(key)
            if begun is None:
                self._begun[key] = own = Future[Packed]()
            else:
                self.hits += 1
        if begun is not None:
            return begun.result().unpack()
        try:
            found, hit = self._read(key), True
            if found is None:
                found, hit = Packed.of(encode(), self.storage), False
        except BaseException as error:
            own.set_exception(error)
            with self._lock:
                del self._begun[key]
            raise
        own.set_result(found)
        with self._lock:
            self._count(key, hit=hit)
            del self._begun[key]
            self._keep(key, found)
        return found.unpack()

    def put(self, key: Key, encoded: Encoded) -> None:
        """Keep a context that was encoded before it is asked for; the first to get it counts as a miss."""
        packed = Packed.of(encoded, self.storage)
        with self._lock:
            self._put.add(key)
            self._keep(key, packed)

    def _count(self, key: Key, *, hit: bool) -> None:
        hit = hit and key not in self._put
        self._put.discard(key)
        self.hits += hit
        self.misses += not hit

    @property
    def keeps(self) -> bool:
        """Whether anything is kept for the next time."""
        return bool(self.capacity) or self.folder is not None

    def has(self, key: Key) -> bool:
        """Return whether a context need not be encoded; one that is asked for will be needed, so it stays."""
        with self._lock:
            kept = key in self._kept
            if kept:
                self._kept.move_to_end(key)
        return kept or self.on_disk(key)

    def clear(self) -> None:
        """Forget what is in memory."""
        self._kept.clear()
        self._put.clear()
        self.bytes_kept = 0

    def on_disk(self, key: Key) -> bool:
        """Return whether the folder has a file of it."""
        path = self._path(key)
        return path is not None and path.is_file()

    def _keep(self, key: Key, packed: Packed) -> None:
        self.token_bytes = packed.nbytes // len(key[0])
        if packed.nbytes > self.capacity:
            self._write(key, packed)
            return
        self._kept[key] = packed
        self.bytes_kept += packed.nbytes
        while self.bytes_kept > self.capacity:
            oldest, dropped = self._kept.popitem(last=False)
            self.bytes_kept -= dropped.nbytes
            self._write(oldest, dropped)

    def _path(self, key: Key) -> Path | None:
        if self.folder is None:
            return None
        name = hashlib.sha256(repr(key).encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def _read(self, key: Key) -> Packed | None:
        path = self._path(key)
        if path is None or not path.is_file():
            return None
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError):
            with suppress(OSError):
                path.unlink()  # a damaged file costs an encoding, no more
            return None
        return Packed(tensors["cache"], tensors.get("scales"), tensors.get("states"))

    def _write(self, key: Key, packed: Packed) -> None:
        path = self._path(key)
        if path is None or path.exists():
            return
        tensors = {name: tensor.cpu().contiguous() for name, tensor in packed.tensors().items()}
        try:
            with replacing(path) as temporary:
                save_file(tensors, temporary)
        except (OSError, SafetensorError, InputError) as error:
            raise InputError(f"passage cache {str(self.folder)!r} cannot be written: {error}") from error


class Filled(Exception):  # noqa: N818 — raised when all is well
    """The last layer's keys and values are there: what the model would compute after them, nobody reads."""


class LastKept(DynamicLayer):  # type: ignore[no-untyped-call]
    """The last layer of a cache that is filled; ends the forward pass once it is."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keep keys and values, and raise `Filled`."""
        super().update(key_states, value_states, *args, **kwargs)
        raise Filled


def filled_layers(count: int) -> list[DynamicLayer]:
    """Return the empty layers of a cache whose filling ends with `Filled`."""
    layers = [DynamicLayer() for _ in range(count - 1)]  # type: ignore[no-untyped-call]
    return [*layers, LastKept()]  # type: ignore[no-untyped-call]


@torch.no_grad()
def keeps_all(model: Any) -> bool:
    """Whether keys and values of one shape, in every layer, are all that a decoder remembers of a context; tried."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ()
    if model._is_stateful or not set(kinds) <= {"full_attention", "sliding_attention"}:
        return False
    cache: Any = DynamicCache()
    cache.layers = filled_layers(config.num_hidden_layers)
    try:
        with suppress(Filled):
            model(input_ids=torch.tensor([[1, 2]], device=model.device), past_key_values=cache, use_cache=True)
    except Exception:  # layers that keep what they remember otherwise, whatever that ends in
        return False
    shapes = {None if each is None else each.shape for kept in cache.layers for each in (kept.keys, kept.values)}
    return len(shapes) == 1 and None not in shapes
