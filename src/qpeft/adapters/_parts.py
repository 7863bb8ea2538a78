"""Parts that several prompt adapters are made of: the words around a hint, and the network behind its vectors.

Shapes: `B` rows, `L` hint vectors, `d` hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qpeft.adapter import PromptAdapter
from qpeft.adapters._choices import Init
from qpeft.errors import OptionError, at_least


class Markers(nn.Module):
    """The words around a hint, such as `hints:` and a newline; token ids, not trained."""

    def __init__(self, tokenizer: Any, prefix: str, suffix: str, device: torch.device) -> None:
        super().__init__()
        for name, text in (("prefix", prefix), ("suffix", suffix)):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
            self.register_buffer(name, torch.tensor(ids, dtype=torch.long, device=device), persistent=False)

    def __len__(self) -> int:
        return len(self.get_buffer("prefix")) + len(self.get_buffer("suffix"))

    def around(self, vectors: Tensor, mask: Tensor, adapter: PromptAdapter) -> tuple[Tensor, Tensor]:
        """Return vectors `[B, L, d]` and mask `[B, L]` with the markers before and after them."""
        pieces, masks = [], []
        for piece in (self.get_buffer("prefix"), None, self.get_buffer("suffix")):
            if piece is None:
                pieces.append(vectors)
                masks.append(mask)
            else:
                pieces.append(adapter.look_up(piece).expand(len(vectors), -1, -1))
                masks.append(mask.new_ones(len(vectors), len(piece)))
        return torch.cat(pieces, 1), torch.cat(masks, 1)


class HintNetwork(nn.Module):
    """The network that every vector of a hint passes through, `[…, d] → […, d]` (arXiv 2404.04522).

    * `default`: Linear → [ReLU → Linear] × layers, all of width d, with PyTorch's initialisation (the authors').
    * `residual_zero`: z + W2 ReLU(W1 z) through a bottleneck, W2 = 0 at the start, so that an untrained hint is the
      plain text of its tokens. Ours.

    Args:
        width: d.
        hidden: width of the bottleneck.
        layers: 0 leaves vectors as they are.
        init: which of the two.
        scale: root mean square of embeddings; the residual network works in units of it, so that one learning rate
            suits models of any embedding size.
    """

    def __init__(self, width: int, hidden: int, layers: int, init: Init, scale: float) -> None:
        super().__init__()
        if layers < 0 or (init == "residual_zero" and layers > 1):
            raise OptionError(f"--mlp-layers is {layers}; with residual_zero it is 0 or 1, else 0 or more")
        at_least(1, mlp_hidden=hidden)
        self._scale = scale
        self._residual = init == "residual_zero"
        steps: list[nn.Module] = []
        if layers and self._residual:
            out = nn.Linear(hidden, width)
            nn.init.zeros_(out.weight)
            nn.init.zeros_(out.bias)
            steps = [nn.Linear(width, hidden), nn.ReLU(), out]
        elif layers:
            steps = [nn.Linear(width, width)]
            for _ in range(layers):
                steps += [nn.ReLU(), nn.Linear(width, width)]
        self.steps = nn.Sequential(*steps)

    def forward(self, vectors: Tensor) -> Tensor:
        if not len(self.steps):
            return vectors
        out: Tensor = self.steps(vectors / self._scale if self._residual else vectors)
        return vectors + self._scale * out if self._residual else out
