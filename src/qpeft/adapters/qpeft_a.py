"""Q-PEFT-A: every query token attends to the passage's tokens, and what it reads stands as a hint (arXiv 2404.04522).

    A = MultiheadAttention( E[q], E[x], E[x] )        one vector per query token
    s = MLP( [ E[prefix] ; A ; E[suffix] ] )

The query acts through the attention weights alone, the content is the passage's: a passage that lacks the matter
cannot supply it.

With `soft_length`, vectors of a soft prompt (`soft_prompt`) stand before the hint and are trained together with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qpeft.adapters._choices import AttentionInit, Init, Table
from qpeft.options import Checked

if TYPE_CHECKING:
    from qpeft.adapter import Adapter
    from qpeft.lm.causal import CausalLM


@dataclass(frozen=True)
class Config(Checked):
    """Options of Q-PEFT-A."""

    num_heads: int = 2
    """Attention heads."""
    attn_dim: int = 64
    """Sum of the widths of the heads (cosine)."""
    attn_init: AttentionInit = "cosine"
    """cosine: starts sharp, low rank; default: full width, PyTorch's initialisation, starts uniform."""
    attn_sharpness: float = 10.0
    """Logit of a cosine of 1 at the start (cosine)."""
    attn_dropout: float = 0.0
    """On attention weights, in training."""
    token_filter: str = ""
    """Passage tokens that are not attended: q: those of the query, s: stop-words, a: those without a letter."""
    template_tokens: bool = False
    """Whether words of the template may be attended."""
    hint_prefix: str = "hints:"
    """Words before the hint."""
    hint_suffix: str = "\n"
    """Words after the hint; by default a line break."""
    mlp_layers: int = 1
    """Depth of the network that hint vectors pass through; 0: none."""
    mlp_hidden: int = 64
    """Width of its bottleneck (residual_zero)."""
    mlp_init: Init = "residual_zero"
    """residual_zero: changes nothing at the start; default: full width, PyTorch's initialisation."""
    token_table: Table = "frozen"
    """Whether query and markers are looked up in a trainable copy of the embedding table."""
    soft_length: int = 0
    """Vectors of a soft prompt before the hint, trained together with it and the same for every pair."""


@dataclass(frozen=True)
class Authors(Config):
    """Options of Q-PEFT-A, with the defaults of the authors' code."""

    attn_init: AttentionInit = "default"
    attn_dropout: float = 0.1
    template_tokens: bool = True
    mlp_init: Init = "default"
    token_table: Table = "trainable"


def build(config: Config, lm: CausalLM) -> Adapter:
    """Return an untrained module for a model.

    Raises:
        OptionError: options out of range.
    """
    from qpeft.adapters._qpeft_a import QPeftA  # torch, only when there is work

    return QPeftA(config, lm)
