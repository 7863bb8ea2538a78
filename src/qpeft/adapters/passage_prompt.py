"""A prompt that depends on the passage alone, after PSPT (arXiv 2405.20654): what Q-PEFT is without its query.

    attend   k learned vectors attend to the passage's tokens, as query tokens do in Q-PEFT-A; k hint vectors
    all      every passage token passes through the network, as in PSPT; as many hint vectors as the passage has tokens

A trained instruction stands before them.
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
    """Options of the passage prompt."""

    form: Literal["attend", "all"] = "attend"
    """What of the passage becomes a hint."""
    k: int = 10
    """Vectors (attend)."""
    most: int | None = None
    """Passage tokens that become hints at most (all); by default every one, for which half of the context is kept."""
    instruction: str = "hints:"
    """What the trained vectors before the hint start as."""
    num_heads: int = 2
    """Attention heads (attend)."""
    attn_dim: int = 64
    """Sum of the widths of the heads (attend)."""
    mlp_hidden: int = 64
    """Width of the network's bottleneck."""
    init_seed: int = 0
    """Of the tokens that the learned vectors start as."""


def build(config: Config, lm: CausalLM) -> Adapter:
    """Return an untrained module for a model.

    Raises:
        OptionError: options out of range.
    """
    from qpeft.adapters._passage_prompt import PassagePrompt  # torch, only when there is work

    return PassagePrompt(config, lm)
