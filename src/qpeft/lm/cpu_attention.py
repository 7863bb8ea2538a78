"""Attention for CPUs, a few rows and positions at a time, so that their scores stay in a core's cache memory.

The fused kernel of PyTorch is slow there for the head sizes and lengths of reranking (docs/performance.md), except for
rows without padding on processors that multiply tiles (AMX), where it takes over. This one is plain: scores, softmax,
weighted sum; registered with transformers under the name `NAME`. It takes contexts that were encoded before as they are
kept, each by itself, and joins a few at a time where it reads them. For gradients whole rows are computed in one piece,
since backpropagation would pay for the pieces, unless they are long and the fused kernel takes over.

Shapes: `B` rows, `H` heads, of which `G` share keys, `T` positions, `S` positions attended to, `h` head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask, sdpa_mask

NAME = "qpeft_cpu"
SCORES = 2**20
"""Scores that are held at a time: two MiB of bf16."""
BLOCK = 96
"""Positions of a row that look back at a time."""
MULTIPLE = 32
"""Scores of a position are made a multiple of these: softmax is slow at what is left over."""
JOINED = 2**21
"""Bytes of keys and values that are joined at a time, unless those of a single row are more."""
TILES = hasattr(torch.cpu, "get_capabilities") and bool(torch.cpu.get_capabilities().get("amx_tile"))
"""Whether the processor multiplies tiles."""
LONG = 256
"""Positions of a row from which on the fused kernel is quicker with gradients too."""


@dataclass(frozen=True, slots=True)
class Contexts:
    """Keys and values of what stands before each row of a batch, `[2, H / G, T, h]` each.

    Given to `attention` as the attribute `contexts` of its keys, which then are those of the batch alone. Contexts end
    together: the mask is that of contexts which are padded on the left.
    """

    rows: Sequence[Tensor]

    @property
    def longest(self) -> int:
        """Positions of the longest."""
        return max(row.shape[2] for row in self.rows)

    def joined(self, key: Tensor, value: Tensor, most: int | None) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield some rows, and their keys and values `[b, H / G, S, h]`: contexts, and what follows them.

        Args:
            key: of the batch, `[B, H / G, T, h]`.
            value: as `key`.
            most: bytes that are joined at a time, unless those of a single row are more; None: all rows.
        """
        shared, width, size = key.shape[1:]
        first = 0
        while first < len(self.rows):
            longest, end = 0, first
            while end < len(self.rows):
                wide = -(-(max(longest, self.rows[end].shape[2]) + width) // MULTIPLE) * MULTIPLE
                bytes_ = (end + 1 - first) * 2 * shared * wide * size * key.element_size()
                if most is not None and end > first and bytes_ > most:
                    break
                longest, end = wide - width, end + 1
            both = key.new_empty(2, end - first, shared, longest + width, size)
            for place, row in enumerate(self.rows[first:end]):
                before = longest - row.shape[2]
                both[:, place, :, :before] = 0  # what is masked must be finite
                both[:, place, :, before:longest] = row
            both[0, :, :, longest:] = key[first:end]
            both[1, :, :, longest:] = value[first:end]
            yield slice(first, end), both[0], both[1]
            first = end


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return `[B, T, H, h]`.

    Args:
        module: the attention layer, which must not drop weights out (frozen models never do).
        query: `[B, H, T, h]`.
        key: `[B, H / G, S, h]`; with contexts, see `Contexts`.
        value: as `key`.
        attention_mask: added to the scores, `[B or 1, 1, T, S]`, or where it is boolean, what is attended to. None in
            a causal layer: each position attends to itself and what stands before it.
        scaling: of the scores; `1 / √h` by default.
        softcap: scores are squeezed between its negative and itself.
        kwargs: others that layers pass.

    Raises:
        NotImplementedError: a layer needs more than this, such as attention sinks.
        ValueError: the mask is not that of these keys.
    """
    for name in ("s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"{NAME} attention knows no {name}")
    batch, heads, width, size = query.shape
    scaling = size**-0.5 if scaling is None else scaling
    contexts: Contexts | None = getattr(key, "contexts", None)
    if contexts is not None:
        assert attention_mask is not None
        wider = pad(attention_mask, (MULTIPLE, 0), value=torch.finfo(attention_mask.dtype).min)
        if torch.is_grad_enabled() and softcap is None:
            over: Tensor = _OverContexts.apply(query, key, value, wider, contexts, scaling)  # type: ignore[no-untyped-call]
            return over, None
        return torch.cat(
            [
                _attend(query[some], keys, values, wider[some, ..., -keys.shape[2] :], scaling, softcap, False, BLOCK)
                for some, keys, values in contexts.joined(key, value, JOINED)
            ]
        ), None
    length = key.shape[2]
    alone = width == length and bool(module.is_causal)
    if attention_mask is None and alone and softcap is None:
        fused = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        return fused.transpose(1, 2), None
    attention_mask = _added(attention_mask, query, length, alone)
    if torch.is_grad_enabled():
        return _attend(query, key, value, attention_mask, scaling, softcap, False, width), None
    # One mask for all rows is that of rows without padding: what stands behind a block of positions is not looked at.
    causal = alone and attention_mask is not None and len(attention_mask) == 1
    # Where few positions look back at many, widening keys and values would cost more than it saves.
    more = -length % MULTIPLE if attention_mask is not None and 2 * width >= length else 0
    if attention_mask is not None and more:
        attention_mask = pad(attention_mask, (0, more), value=torch.finfo(attention_mask.dtype).min)
    block = min(width, BLOCK)
    rows = max(1, SCORES // (heads * block * length))
    parts = []
    for i in range(0, batch, rows):
        some = slice(i, i + rows)
        mask = attention_mask if attention_mask is None or len(attention_mask) == 1 else attention_mask[some]
        parts.append(_attend(query[some], key[some], value[some], mask, scaling, softcap, causal, block))
    return torch.cat(parts), None


def _added(mask: Tensor | None, query: Tensor, length: int, causal: bool) -> Tensor | None:
    """Return a mask as numbers that are added to scores."""
    if mask is None and causal:
        mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=query.device).tril()
    if mask is None:
        return None
    if mask.shape[-1] != length:
        raise ValueError(f"{NAME} attention got {length} keys and a mask for {mask.shape[-1]}")
    if mask.dtype != torch.bool:
        return mask
    return query.new_zeros(mask.shape).masked_fill(~mask, torch.finfo(query.dtype).min)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
    causal: bool,
    block: int,
) -> Tensor:
    """Return `[B, T, H, h]`, a block of positions at a time."""
    batch, heads, width, _ = query.shape
    shared, length = batch * key.shape[1], key.shape[2]
    wide = length if mask is None else mask.shape[-1]
    if wide > length:
        key, value = pad(key, (0, 0, 0, wide - length)), pad(value, (0, 0, 0, wide - length))
    keys = key.reshape(shared, wide, -1).transpose(1, 2)
    values = value.reshape(shared, wide, -1)
    parts = []
    for first in range(0, width, block):
        some = query[:, :, first : first + block]
        end = wide
        if causal:
            end = min(end, -(-(first + some.shape[2]) // MULTIPLE) * MULTIPLE)
        seen = None if mask is None else mask[..., first : first + block, :end]
        weights = _weights(some, keys[..., :end], seen, scaling, softcap)
        parts.append(torch.bmm(weights, values[:, :end]).view(batch, heads, -1, values.shape[-1]).transpose(1, 2))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _weights(query: Tensor, keys: Tensor, mask: Tensor | None, scaling: float, softcap: float | None) -> Tensor:
    """Return the weights `[B · G, H / G · T, S]` of queries `[B, H, T, h]` over keys `[B · G, h, S]`."""
    batch, heads, _, size = query.shape
    shared, _, length = keys.shape
    scores = torch.bmm(query.reshape(shared, -1, size) * scaling, keys).view(batch, heads, -1, length)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores += mask
    return torch.softmax(scores, -1).view(shared, -1, length)


class _OverContexts(torch.autograd.Function):
    """Attention over contexts, which need no gradient, and what follows them, which does.

    Gradients of the contexts' keys and values, most of what is multiplied otherwise, are not computed; and contexts are
    joined again for backpropagation, since to keep them joined until then would double what it keeps.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, contexts: Contexts, scaling: float
    ) -> Tensor:
        ((_, keys, values),) = contexts.joined(key, value, None)
        keys, values = keys.flatten(0, 1), values.flatten(0, 1)
        weights = _weights(query, keys.mT, mask[..., -keys.shape[1] :], scaling, None)
        ctx.save_for_backward(query, key, value, weights)
        ctx.contexts, ctx.scaling = contexts, scaling
        return torch.bmm(weights, values).view(query.shape).transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, weights = ctx.saved_tensors
        width = query.shape[2]
        ((_, keys, values),) = ctx.contexts.joined(key, value, None)
        keys, values = keys.flatten(0, 1), values.flatten(0, 1)
        above, queries = (each.reshape(len(keys), -1, each.shape[-1]) for each in (grad.transpose(1, 2), query))
        scores = torch.ops.aten._softmax_backward_data(torch.bmm(above, values.mT), weights, -1, weights.dtype)
        of_query = torch.bmm(scores, keys) * ctx.scaling
        of_key = torch.bmm(scores[..., -width:].mT, queries * ctx.scaling)
        of_value = torch.bmm(weights[..., -width:].mT, above)
        return of_query.view(query.shape), of_key.view(key.shape), of_value.view(key.shape), None, None, None


def mask_for(batch_size: int, **kwargs: Any) -> Tensor | None:
    """Return what `attention` adds to the scores: one mask for all rows where no row is padded, or none at all."""
    padded = kwargs.get("attention_mask") is not None
    fused = TILES and (kwargs["q_length"] >= LONG or not torch.is_grad_enabled())
    if fused and not padded and sdpa_mask(1, **kwargs) is None:
        return None
    mask: Tensor | None = eager_mask(batch_size if padded else 1, **kwargs)
    return mask


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask_for)
