"""The bare matrix products that some pairs need, done as fast as this machine does products of the model's shapes.

Counted: the layers' products for every token that is read, attention's two products for every earlier token, the head's
product at scored positions only; no padding. Each shape is first tried with chunks of several heights and the weights
laid out both ways, and the quickest is taken. Nothing but products is timed: no attention softmax, norms, activations,
no reading of texts. No scorer that computes every layer at every token in this number type can be quicker; ours leaves
out what the last layer would compute where nobody reads it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qpeft.lm.causal import CausalLM
from qpeft.template import Row

HEIGHTS = (64, 128, 256, 512, 1024, 2048, 4096)
TALL = (8192, 16_384)
"""Heights that are tried too where there is a GPU."""


@dataclass(frozen=True, slots=True)
class Product:
    """`[height, inner] @ [inner, width]`."""

    height: int
    inner: int
    width: int

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        return 2 * self.height * self.inner * self.width


@dataclass(frozen=True, slots=True)
class Attention:
    """Scores and weighted sums of one row in all layers: for each head, every token with itself and those before it."""

    rows: int
    length: int
    heads: int
    size: int
    layers: int

    @property
    def flops(self) -> int:
        """Multiplications and additions of what a causal model needs: the triangle."""
        return self.rows * self.layers * self.heads * 2 * self.size * self.length * (self.length + 1)


def needed(lm: CausalLM, rows: Sequence[Row]) -> tuple[list[Product], Attention]:
    """Return the products that rows need.

    The linear layers, and where each of them runs, are read off one forward pass of the model. A row's last token is
    predicted and not read. Attention is counted at the mean length whose triangles have the same area.
    """
    read, scored = sum(len(row) - 1 for row in rows), sum(sum(row.scored) for row in rows)
    products: Counter[tuple[int, int, int]] = Counter()
    for inner, width, per_token in _linear_layers(lm):
        products[read if per_token else scored, inner, width] += 1
    config = lm.model.config.get_text_config()
    heads = config.num_attention_heads
    area = sum((len(row) - 1) * len(row) for row in rows) / len(rows)
    attention = Attention(
        rows=len(rows),
        length=round(((1 + 4 * area) ** 0.5 - 1) / 2),
        heads=heads,
        size=getattr(config, "head_dim", None) or config.hidden_size // heads,
        layers=config.num_hidden_layers,
    )
    return [Product(height * count, inner, width) for (height, inner, width), count in products.items()], attention


def _linear_layers(lm: CausalLM) -> Iterator[tuple[int, int, bool]]:
    """Yield inner and outer size of each linear layer that a forward pass runs, and whether it runs for every token."""
    probe = torch.arange(3, 16, device=lm.device)[None]
    predicting = torch.zeros_like(probe).bool()
    predicting[0, -3:] = True
    seen: list[tuple[int, int, int]] = []

    def note(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append((layer.in_features, layer.out_features, inputs[0].numel() // layer.in_features))

    layers = [module for module in lm.model.modules() if isinstance(module, torch.nn.Linear)]
    hooks = [layer.register_forward_hook(note) for layer in layers]
    try:
        with torch.no_grad():
            lm.model(input_ids=probe, use_cache=False, logits_to_keep=predicting)
    finally:
        for hook in hooks:
            hook.remove()
    for inner, width, height in seen:
        yield inner, width, height == probe.numel()


class Ceiling:
    """Does the products of some pairs, as quickly as can be."""

    def __init__(self, products: Sequence[Product], attention: Attention, dtype: torch.dtype, device: str) -> None:
        self.flops = sum(product.flops for product in products) + attention.flops
        self._work = [_quickest(product, dtype, device) for product in products]
        self._work.append(_quickest_attention(attention, dtype, device))

    @torch.inference_mode()
    def __call__(self) -> None:
        """Do all of them once."""
        for work in self._work:
            work()


def _quickest(product: Product, dtype: torch.dtype, device: str) -> Callable[[], None]:
    """Return a function that does the product in the best chunks."""
    weights = torch.randn(product.width, product.inner, device=device).to(dtype)
    layouts = [weights.T, weights.T.contiguous()]
    best: tuple[float, int, Tensor] | None = None
    heights = HEIGHTS if device == "cpu" else HEIGHTS + TALL
    for height in [h for h in heights if h <= product.height] or [product.height]:
        left = torch.randn(height, product.inner, device=device).to(dtype)
        for right in layouts:
            seconds = _best_of(lambda left=left, right=right: torch.mm(left, right)) / height
            if best is None or seconds < best[0]:
                best = (seconds, height, right)
    assert best is not None
    _, height, right = best
    left = torch.randn(height, product.inner, device=device).to(dtype)
    times, rest = divmod(product.height, height)
    out = torch.empty(height, product.width, dtype=dtype, device=device)

    def work() -> None:
        for _ in range(times):
            torch.mm(left, right, out=out)
        if rest:
            torch.mm(left[:rest], right, out=out[:rest])

    return work


def _quickest_attention(attention: Attention, dtype: torch.dtype, device: str) -> Callable[[], None]:
    """Return a function that does as many products of one row's shapes as the triangles make up."""
    best: tuple[float, int] | None = None
    for rows in (1, 2, 4, 8, 16):
        left, right, scores = _attention_operands(attention, rows, dtype, device)
        seconds = _best_of(lambda a=left, b=right, c=scores: (torch.bmm(a, b), torch.bmm(c, a))) / rows
        if best is None or seconds < best[0]:
            best = (seconds, rows)
    assert best is not None
    rows = best[1]
    left, right, scores = _attention_operands(attention, rows, dtype, device)
    rectangles = attention.layers * attention.rows * (attention.length + 1) / (2 * attention.length)

    def work() -> None:
        for _ in range(max(1, round(rectangles / rows))):
            torch.bmm(left, right)
            torch.bmm(scores, left)

    return work


def _attention_operands(
    attention: Attention, rows: int, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    left = torch.randn(rows * attention.heads, attention.length, attention.size, device=device).to(dtype)
    scores = torch.rand(rows * attention.heads, attention.length, attention.length, device=device).to(dtype)
    return left, left.transpose(1, 2), scores


@torch.inference_mode()
def _best_of(work: Callable[[], Any], least: float = 0.02) -> float:
    """Return the best time of at least three runs and `least` seconds."""
    best, started, runs = float("inf"), time.perf_counter(), 0
    while runs < 3 or time.perf_counter() - started < least:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        begun = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best, runs = min(best, time.perf_counter() - begun), runs + 1
    return best
