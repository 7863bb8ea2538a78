"""Attention for CPUs, a few rows at a time, so that their scores stay in a core's cache memory.

The fused kernel of PyTorch is slow there for the head sizes and lengths of reranking (docs/performance.md). This one is
plain: scores, softmax, weighted sum; registered with transformers under the name `NAME`.

Shapes: `B` rows, `H` heads, of which `G` share keys, `T` positions, `S` positions attended to, `h` head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

NAME = "qpeft_cpu"
SCORES = 2**19
"""Scores that are held at a time: one MiB of bf16."""


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
    scaling = size**-0.5 if scaling is None else scaling
    rows = max(1, SCORES // (heads * width * key.shape[2]))
    parts = []
    for i in range(0, batch, rows):
        some = slice(i, i + rows)
        mask = attention_mask if attention_mask is None or len(attention_mask) == 1 else attention_mask[some]
        parts.append(_attend(query[some], key[some], value[some], mask, scaling, softcap))
    return torch.cat(parts).transpose(1, 2).contiguous(), None


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, softcap: float | None
) -> Tensor:
    """Return `[B, H, T, h]`."""
    batch, heads, width, size = query.shape
    shared = batch * key.shape[1]
    keys, values = key.reshape(shared, -1, size), value.reshape(shared, -1, value.shape[-1])
    scores = torch.bmm((query * scaling).reshape(shared, -1, size), keys.transpose(1, 2))
    scores = scores.view(batch, heads, width, -1)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores + mask
    weights = torch.softmax(scores, -1)
    return torch.bmm(weights.view(shared, -1, keys.shape[1]), values).view(batch, heads, width, -1)


def mask_for(batch_size: int, **kwargs: Any) -> Tensor | None:
    """Return what `attention` adds to the scores: one mask for all rows where no row is padded."""
    mask: Tensor | None = eager_mask(1 if kwargs.get("attention_mask") is None else batch_size, **kwargs)
    return mask


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask_for)
