"""The hints of a batch: what adapters wrote for its rows, and which adapters may share one.

Shapes: `B` rows, `L` hint vectors, `d` hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from qpeft.adapter import Adapter, Hints, Pairs
from qpeft.errors import OptionError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Slots:
    """The hints of a batch without padding: `vectors` `[Σ lengths, d]`, row by row."""

    vectors: Tensor
    lengths: list[int]

    @classmethod
    def of(cls, hints: Hints) -> Slots:
        """Drop what is masked."""
        return cls(hints.vectors[hints.mask], hints.mask.sum(1).tolist())

    def put_into(self, embedded: Tensor, places: Tensor) -> Tensor:
        """Return `embedded` `[B, T, d]` with these vectors where `places` `[B, T]` says.

        Raises:
            OptionError: the vectors are not as wide as the model's.
        """
        if self.vectors.shape[1] != embedded.shape[2]:
            raise OptionError(f"an adapter wrote vectors of {self.vectors.shape[1]}; they are of {embedded.shape[2]}")
        return embedded.masked_scatter(places[..., None], self.vectors.to(embedded.dtype))

    @classmethod
    def merge(cls, parts: list[tuple[list[int], Slots]], rows: int) -> Slots:
        """Put the hints of several adapters together; each part says which rows it is for. Other rows have none."""
        pieces: list[Tensor | None] = [None] * rows
        for places, part in parts:
            for place, piece in zip(places, torch.split(part.vectors, part.lengths), strict=True):
                pieces[place] = piece
        lengths = [0 if piece is None else len(piece) for piece in pieces]
        return cls(torch.cat([piece for piece in pieces if piece is not None]), lengths)


def written(adapter: Adapter, pairs: Pairs, lengths: Sequence[int]) -> Slots:
    """Return what an adapter writes for pairs whose queries have so many tokens.

    Raises:
        OptionError: shapes or types that `Hints` does not have; or more vectors than it said that it would write, so
            that rows may not fit the model.
    """
    hints = adapter(pairs)
    if hints.vectors.ndim != 3 or hints.mask.shape != hints.vectors.shape[:2] or len(hints.mask) != len(pairs.query):
        shapes = f"vectors {[*hints.vectors.shape]} and a mask {[*hints.mask.shape]} for {len(pairs.query)} rows"
        raise OptionError(f"{type(adapter).__name__} wrote {shapes}; they are [B, L, d] and [B, L]")
    if hints.mask.dtype != torch.bool:
        raise OptionError(f"{type(adapter).__name__} wrote a mask of {hints.mask.dtype}; it is torch.bool")
    slots = Slots.of(hints)
    for length, tokens in zip(slots.lengths, lengths, strict=True):
        if length > adapter.hint_length(tokens):
            most = f"hint_length({tokens}) says at most {adapter.hint_length(tokens)}"
            raise OptionError(f"{type(adapter).__name__} wrote {length} vectors, but its {most}")
    return slots


def grouped(keys: Iterable[Hashable]) -> list[list[int]]:
    """Return the places of equal keys, in order."""
    groups: dict[Hashable, list[int]] = {}
    for place, key in enumerate(keys):
        groups.setdefault(key, []).append(place)
    return list(groups.values())


def in_groups(keys: Iterable[Hashable], compute: Callable[[list[int]], Iterable[T]]) -> list[T]:
    """Return what is computed of each place, places of equal keys together, in the places' order."""
    found: dict[int, T] = {}
    for places in grouped(keys):
        found |= zip(places, compute(places), strict=True)
    return [found[place] for place in range(len(found))]


def changing(adapters: Sequence[Adapter | None]) -> Adapter | None:
    """Return the adapter that changes the model for a batch, if any."""
    found = next((adapter for adapter in adapters if adapter is not None and adapter.changes_lm), None)
    if found is not None and any(adapter is not found for adapter in adapters):
        raise OptionError("an adapter that changes the model's layers (LoRA) cannot share a batch with others or none")
    return found


def common_layer(adapters: Sequence[Adapter]) -> int | None:
    """Return the layer whose states adapters read, if any does."""
    layers = {adapter.reads_layer for adapter in adapters} - {None}
    if len(layers) > 1:
        raise OptionError(f"adapters of one batch read states of different layers: {sorted(map(str, layers))}")
    return layers.pop() if layers else None
