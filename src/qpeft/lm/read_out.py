"""What is read at the last token of a row: the words that may follow, or the state behind a trained head.

Shapes: `B` rows, `k` values of each, `d` hidden size, `V` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

WEIGHT = "score.weight"
"""Name of a head's tensor in transformers' classifiers."""


def linear_head(weight: Tensor) -> nn.Linear:
    """Return the module of a head without bias, `[k, d]`, not trained."""
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device, dtype=weight.dtype)
    module.weight.data = weight
    return module.requires_grad_(False)


@dataclass(frozen=True)
class Head:
    """A trained module on the state of the last token, after the model's last norm: `[B, d] → [B, k]`."""

    module: nn.Module

    def __call__(self, states: Tensor) -> Tensor:
        """Return float32, whatever the model's type."""
        weight = next(self.module.parameters())
        values: Tensor = self.module(states.to(weight.dtype))
        return values.float()

    @property
    def weights(self) -> int:
        """Multiply-adds for a row."""
        return sum(parameter.numel() for parameter in self.module.parameters())


@dataclass(frozen=True)
class Answers:
    """Log-probabilities, in nats, of tokens that may follow the last one; they get the model's own head."""

    tokens: tuple[int, ...]

    def __call__(self, logits: Tensor) -> Tensor:
        """Return those of logits `[B, V]`: `[B, k]` float32."""
        return logits.float().log_softmax(-1)[:, list(self.tokens)]


ReadOut = Head | Answers
