"""How the rows of a batch become rectangles.

A row is   context[:hint] · hint vectors · context[hint:] · target.   Its first `start` context tokens may already be
encoded; then the rectangle holds only what follows them. A token is predicted by the state before it, so the last one
is a label and no input. Of a row without a target, the last token is an input, and its state is asked for.

Shapes: `B` rows, `S` positions of the rectangle, `N` scored tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from qpeft.adapter import Adapter
from qpeft.template import Row

PaddingSide = Literal["left", "right"]
EIGHTHS = 8
"""Into so many parts `few_sizes` divides the room between two powers of two."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The inputs of a batch.

    `ids` `[B, S]` are tokens, of which `mask` `[B, S]` are real; hint vectors replace those at `slots` `[B, S]`. The
    states at `predicting` `[B, S]` predict `labels` `[N]`, row by row; `counts` says how many each row has. A row
    without a target has no label: what follows it is not known.
    """

    ids: Tensor
    mask: Tensor
    slots: Tensor
    predicting: Tensor
    labels: Tensor
    counts: list[int]


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch as the model takes it.

    `starts`: tokens of each row that are encoded already; `changing`: the adapter that changes the model; `sparing`:
    whether the last layer is computed only where something is read.
    """

    layout: Layout
    starts: Sequence[int]
    inputs: dict[str, Any]
    changing: Adapter | None
    sparing: bool


def lay_out(
    rows: Sequence[Row],
    *,
    starts: Sequence[int],
    hints: Sequence[int],
    with_passage: bool = False,
    padding_side: PaddingSide = "right",
    multiple: int = 1,
) -> Layout:
    """Return the rectangle of a batch.

    Args:
        rows: token ids.
        starts: context tokens of each row that are left out because they are encoded already.
        hints: vectors of each row.
        with_passage: the passage's tokens are scored too, before the target's.
        padding_side: where short rows are padded.
        multiple: the rectangle's width is a multiple of it.
    """
    lengths = [len(row) + hint - start - bool(row.target) for row, hint, start in zip(rows, hints, starts, strict=True)]
    shape = len(rows), -(-max(lengths) // multiple) * multiple
    ids = torch.zeros(shape, dtype=torch.long)
    mask, slots, predicting = torch.zeros(3, *shape, dtype=torch.bool)
    labels: list[int] = []
    counts = []
    for i, (row, start, hint, length) in enumerate(zip(rows, starts, hints, lengths, strict=True)):
        first = shape[1] - length if padding_side == "left" else 0
        own = slice(first, first + length)
        place = len(row.context) if row.hint is None else row.hint
        tokens = [*row.context[start:place], *[0] * hint, *row.context[place:], *row.target]
        scored = [False] * (len(tokens) - len(row.target)) + (list(row.scored) if row.target else [True])
        if with_passage:
            shift = hint if place <= row.passage[0] else 0
            for position in range(row.passage[0] + shift, row.passage[1] + shift):
                scored[position] = position > 0  # without BOS, the first token has nothing to be predicted from
        ids[i, own] = torch.tensor(tokens[:length])
        mask[i, own] = True
        slots[i, first + place - start : first + place - start + hint] = True
        predicting[i, own] = torch.tensor(scored[1:])
        labels += [token for token, wanted in zip(tokens, scored, strict=bool(row.target)) if wanted]
        counts.append(sum(scored))
    return Layout(ids, mask, slots, predicting, torch.tensor(labels), counts)


def few_sizes(wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Return a mask with some more positions than `wanted` `[B, S]`, and `[N]`: which of its positions those are.

    N is a multiple of an eighth of the power of two below it (less than an eighth more than wanted), or all there are:
    on CPUs a kernel is compiled for every shape that is new, and the head's are the largest.
    """
    flat = wanted.flatten()
    count = int(flat.sum())
    more = -count % max(1, 2 ** (count.bit_length() - 1) // EIGHTHS)
    kept = flat.clone()
    kept[torch.nonzero(~flat)[:more, 0]] = True
    return kept.view_as(wanted), flat[kept]


def cached(row: Row, hint: int) -> int:
    """Return how many context tokens stand in the cache: all before the hint, but something must predict the query."""
    before = len(row.context[: row.hint])
    return before if hint or before < len(row.context) else before - 1
