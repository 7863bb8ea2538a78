"""Attention from one set of tokens to a passage's, as prompt adapters use it.

`default` is PyTorch's multi-head attention over static embeddings with its initialisation, as in the authors' code
(arXiv 2404.04522): it starts uniform, and every output is the passage's mean vector.

`cosine` is ours. Keys and queries are projections of unit vectors onto the principal axes of the embedding table,
`dim` of them shared out among the heads, scaled so that a logit starts near `sharpness` times a centred cosine. What is
attended is read as it is, so outputs start inside the embedding space, plus a low-rank term that starts at zero:

    A = Σ_j w_j x_j  +  W_o [ Σ_j w_j^h W_v^h x_j ]_h ,    w = mean over heads,  W_o = 0 at the start

Shapes: `B` rows, `n` attending tokens, `m` passage tokens, `d` hidden size, `a` = dim, `H` heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qpeft.errors import OptionError


class CosineAttention(nn.Module):
    """Attention whose weights start as a softmax of cosines.

    Args:
        table: the embedding table `[V, d]`, for its axes and its mean.
        heads: H.
        dim: a, the sum of the widths of the heads.
        sharpness: logit of a cosine of 1.
        dropout: on the weights.
        scale: root mean square of embeddings.
        context: width of contextual states that keys and values may read besides embeddings; 0: none.
    """

    def __init__(
        self, table: Tensor, heads: int, dim: int, sharpness: float, dropout: float, scale: float, context: int = 0
    ) -> None:
        super().__init__()
        width = table.shape[1]
        if heads < 1 or dim < heads or dim % heads or dim > width:
            raise OptionError(f"--attn-dim {dim} must be a multiple of --num-heads {heads}, and at most {width}")
        self.heads, self._sharpness, self._scale = heads, sharpness, scale
        unit = nn.functional.normalize(table, dim=1)
        self.register_buffer("mean", unit.mean(0), persistent=False)
        axes = _spread(unit - unit.mean(0), heads, dim)
        self.query = nn.Parameter(axes.clone())
        self.key = nn.Parameter(axes.clone())
        self.value = nn.Linear(width, dim, bias=False)
        self.out = nn.Linear(dim, width, bias=False)
        nn.init.zeros_(self.out.weight)
        self.dropout = nn.Dropout(dropout)
        self.context_key = self.context_value = None
        if context:
            self.context_key = nn.Linear(context, dim, bias=False)
            self.context_value = nn.Linear(context, dim, bias=False)
            nn.init.zeros_(self.context_key.weight)

    def forward(
        self, query: Tensor, passage: Tensor, allowed: Tensor, states: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return outputs `[B, n, d]` and weights `[B, n, m]`, the heads' mean.

        Args:
            query: `[B, n, d]`.
            passage: `[B, m, d]`.
            allowed: `[B, m]`; a row in which nothing is allowed reads zeros.
            states: `[B, m, context]`, for an attention that was built with `context`.
        """
        q, k = self._centred(query) @ self.query.T, self._centred(passage) @ self.key.T
        v = self.value(passage) / self._scale
        if states is not None and self.context_key is not None and self.context_value is not None:
            states = nn.functional.layer_norm(states.float(), states.shape[-1:])
            k, v = k + self.context_key(states), v + self.context_value(states)
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        logits = self._sharpness * (q @ k.transpose(2, 3))
        weights = self.dropout(_masked_softmax(logits, allowed[:, None, None]))
        mean = weights.mean(1)
        read = (weights @ v).transpose(1, 2).flatten(2)
        return mean @ passage + self._scale * self.out(read), mean

    def _centred(self, vectors: Tensor) -> Tensor:
        return nn.functional.normalize(vectors, dim=2) - self.get_buffer("mean")


class DefaultAttention(nn.Module):
    """PyTorch's multi-head attention behind the same call."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise OptionError(f"--num-heads is {heads}; it must divide the hidden size {width}")
        self.attention = nn.MultiheadAttention(width, heads, dropout=dropout, batch_first=True)

    def forward(
        self, query: Tensor, passage: Tensor, allowed: Tensor, states: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return outputs `[B, n, d]` and weights `[B, n, m]`; see `CosineAttention`."""
        if not passage.shape[1]:
            return torch.zeros_like(query), query.new_zeros(*query.shape[:2], 0)
        some = allowed.any(1)
        hidden = ~allowed & some[:, None]  # a row without any key would be NaN
        out, weights = self.attention(query, passage, passage, key_padding_mask=hidden)
        return out * some[:, None, None], weights * some[:, None, None]


def _masked_softmax(logits: Tensor, allowed: Tensor) -> Tensor:
    """Return the softmax over what is allowed, exactly 0 elsewhere, also where nothing is."""
    return logits.masked_fill(~allowed, torch.finfo(logits.dtype).min).softmax(-1) * allowed


def _spread(centred: Tensor, heads: int, dim: int) -> Tensor:
    """Return the `dim` principal axes `[a, d]`, dealt out so that heads get like shares, each head of unit size."""
    # On the CPU, whatever the device: not every one has eigh, and an initialisation should be the same on all.
    axes = torch.linalg.eigh((centred.T @ centred).cpu()).eigenvectors.flip(1)[:, :dim].T.to(centred)
    # Signs of eigenvectors are arbitrary; fixing them makes an initialisation the same everywhere.
    axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
    dealt = torch.stack([axes[head::heads] for head in range(heads)])
    read = torch.einsum("vd,had->vha", centred, dealt)
    size = read.pow(2).sum(2).mean(0)
    return torch.flatten(dealt / size.sqrt()[:, None, None], 0, 1)
