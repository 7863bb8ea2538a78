"""Attention for CPUs, a few rows and positions at a time, so that their scores stay in a core's cache memory.

The fused kernel of PyTorch is slow there for the head sizes and lengths of reranking (docs/performance.md). This one is
plain: scores, softmax, weighted sum; registered with transformers under the name `NAME`.

Shapes: `B` rows, `H` heads, of which `G` share keys, `T` positions, `S` positions attended to, `h` head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

NAME = "qpeft_cpu"
SCORES = 2**20
"""Scores that are held at a time: two MiB of bf16."""
BLOCK = 96
"""Positions of a row that look back at a time."""
MULTIPLE = 32
"""Scores of a position are made a multiple of these: softmax is slow at what is left over."""


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
        key: `[B, H / G, S, h]`.
        value: as `key`.
        attention_mask: added to the scores, `[B or 1, 1, T, S]`.
        scaling: of the scores; `1 / √h` by default.
        softcap: scores are squeezed between its negative and itself.
        kwargs: others that layers pass.

    Raises:
        NotImplementedError: a layer needs more than this, such as attention sinks.
    """
    for name in ("s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"{NAME} attention knows no {name}")
    batch, heads, width, size = query.shape
    length = key.shape[2]
    # One mask for all rows is that of rows without padding: what stands behind a block of positions is not looked at.
    causal = attention_mask is not None and len(attention_mask) == 1 and width == length and bool(module.is_causal)
    # Where few positions look back at many, widening keys and values would cost more than it saves.
    more = -length % MULTIPLE if attention_mask is not None and 2 * width >= length else 0
    if attention_mask is not None and more:
        attention_mask = pad(attention_mask, (0, more), value=torch.finfo(attention_mask.dtype).min)
    block = min(width, BLOCK)
    rows = max(1, SCORES // (heads * block * length))
    scaling = size**-0.5 if scaling is None else scaling
    parts = []
    for i in range(0, batch, rows):
        some = slice(i, i + rows)
        mask = attention_mask if attention_mask is None or len(attention_mask) == 1 else attention_mask[some]
        parts.append(_attend(query[some], key[some], value[some], mask, scaling, softcap, causal))
    return torch.cat(parts), None


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
    causal: bool,
) -> Tensor:
    """Return `[B, T, H, h]`."""
    batch, heads, width, size = query.shape
    shared, length = batch * key.shape[1], key.shape[2]
    wide = length if mask is None else mask.shape[-1]
    if wide > length:
        key, value = pad(key, (0, 0, 0, wide - length)), pad(value, (0, 0, 0, wide - length))
    keys = key.reshape(shared, wide, -1).transpose(1, 2)
    values = value.reshape(shared, wide, -1)
    parts = []
    for first in range(0, width, BLOCK):
        some = query[:, :, first : first + BLOCK]
        end = wide
        if causal:
            end = min(end, -(-(first + some.shape[2]) // MULTIPLE) * MULTIPLE)
        scores = torch.bmm(some.reshape(shared, -1, size) * scaling, keys[..., :end]).view(batch, heads, -1, end)
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        if mask is not None:
            scores += mask[..., first : first + BLOCK, :end]
        weights = torch.softmax(scores, -1).view(shared, -1, end)
        parts.append(torch.bmm(weights, values[:, :end]).view(batch, heads, -1, values.shape[-1]).transpose(1, 2))
    return torch.cat(parts, 1)


def mask_for(batch_size: int, **kwargs: Any) -> Tensor | None:
    """Return what `attention` adds to the scores: one mask for all rows where no row is padded."""
    mask: Tensor | None = eager_mask(1 if kwargs.get("attention_mask") is None else batch_size, **kwargs)
    return mask


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask_for)
