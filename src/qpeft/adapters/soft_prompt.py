"""A static soft prompt: T trained vectors, the same for every query and passage (Lester et al. 2021, arXiv 2104.08691).

The honest low-cost baseline for prompts that depend on the input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from qpeft.options import Checked

if TYPE_CHECKING:
    from qpeft.adapter import Adapter
    from qpeft.lm.causal import CausalLM


@dataclass(frozen=True)
class Config(Checked):
    """Options of the soft prompt."""

    length: int = 20
    """T, the number of vectors."""
    init: Literal["text", "vocabulary", "random"] = "text"
    """What the vectors start as: the tokens of a text, tokens drawn from the vocabulary, or noise of their size."""
    init_text: str = "please generate a question for the input passage"
    """The text, repeated or cut to the length."""
    init_seed: int = 0
    """Of the draw."""


def build(config: Config, lm: CausalLM) -> Adapter:
    """Return an untrained prompt for a model.

    Raises:
        OptionError: no vector, or a text without a token.
    """
    from qpeft.adapters._soft_prompt import SoftPrompt  # torch, only when there is work

    return SoftPrompt(config, lm)
