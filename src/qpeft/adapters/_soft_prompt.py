"""The module behind soft_prompt.py: soft prompt."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from qpeft.adapter import Hints, Pairs, PromptAdapter, whole_table
from qpeft.adapters.soft_prompt import Config
from qpeft.errors import OptionError, at_least
from qpeft.lm.causal import CausalLM


class SoftPrompt(PromptAdapter):
    """The vectors; trained in units of the embeddings' size, so that one learning rate suits every model."""

    def __init__(self, config: Config, lm: CausalLM) -> None:
        at_least(1, length=config.length)
        table = whole_table(lm)
        super().__init__(lm, table)
        self.config = config
        self.vectors = nn.Parameter(self._start(config, lm, table) / self.scale)
        self.to(lm.device)

    def _start(self, config: Config, lm: CausalLM, table: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(config.init_seed)
        if config.init == "random":
            return (torch.randn(config.length, self.width, generator=generator) * self.scale).to(table.device)
        if config.init == "vocabulary":
            return table[torch.randint(len(table), (config.length,), generator=generator).to(table.device)].clone()
        ids = lm.tokenizer(config.init_text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise OptionError(f"--init-text {config.init_text!r} has no tokens")
        return table[[ids[i % len(ids)] for i in range(config.length)]].clone()

    def hint_length(self, query_tokens: int) -> int:
        """Return T."""
        return len(self.vectors)

    def forward(self, pairs: Pairs) -> Hints:
        """Return the same vectors for every row."""
        vectors = (self.scale * self.vectors).expand(len(pairs.query), -1, -1)
        return Hints(vectors, torch.ones(vectors.shape[:2], dtype=torch.bool, device=vectors.device))

    def before(self, pairs: Pairs, hints: Hints) -> Hints:
        """Return hints `[B, L, d]` with these vectors before them, `[B, T + L, d]`."""
        own = self(pairs)
        vectors, mask = torch.cat([own.vectors, hints.vectors], 1), torch.cat([own.mask, hints.mask], 1)
        return replace(hints, vectors=vectors, mask=mask)


def beside_a_hint(length: int, lm: CausalLM) -> SoftPrompt | None:
    """Return a soft prompt of so many vectors, for an adapter that is trained together with one; None of none.

    Raises:
        OptionError: fewer than none.
    """
    at_least(0, soft_length=length)
    return SoftPrompt(Config(length), lm) if length else None
