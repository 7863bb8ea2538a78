"""Q-PEFT-R: the passage's k tokens that are most like the query's stand as a hint (arXiv 2404.04522).

    S[i, j] = cos( E[q_i], E[x_j] )              static embeddings; or their dot product
    score(token) = max over i and all j that hold it of S[i, j];   the k best tokens, ties by the earliest place
    s = MLP( E[ prefix ; tokens 1 … k ; suffix ] )

Choosing is not differentiable: what learns is the MLP, and the table where it is trainable. A passage with fewer than k
tokens gives fewer hints. With `soft_length`, vectors of a soft prompt (`soft_prompt`) stand before the hint and are
trained together with it.

The control `select: random` takes k pseudo-random tokens instead, a fixed function of query, passage and `select_seed`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from qpeft.adapters._choices import Init, Table
from qpeft.options import Checked

if TYPE_CHECKING:
    from qpeft.adapter import Adapter
    from qpeft.lm.causal import CausalLM


@dataclass(frozen=True)
class Config(Checked):
    """Options of Q-PEFT-R."""

    k: int = 10
    """Passage tokens in the hint."""
    select: Literal["similar", "random"] = "similar"
    """Tokens like the query's; random ones are a control."""
    select_seed: int = 0
    """Of the random choice; 0: one order of all tokens, which the query only turns."""
    similarity: Literal["cosine", "dot"] = "cosine"
    """How token vectors are compared."""
    similarity_table: Table = "frozen"
    """Whether the query's vectors for the comparison are trainable too."""
    token_filter: str = "ds"
    """d: each token once, q: none of the query, s: no stop-words, a: none without a letter."""
    template_tokens: bool = False
    """Whether words of the template may be chosen."""
    hint_prefix: str = "hints:"
    """Words before the hint."""
    hint_suffix: str = "\n"
    """Words after the hint; by default a line break."""
    mlp_layers: int = 1
    """Depth of the network that hint vectors pass through; 0: none."""
    mlp_hidden: int = 128
    """Width of its bottleneck (residual_zero)."""
    mlp_init: Init = "residual_zero"
    """residual_zero: an untrained hint is plain text; default: full width, PyTorch's initialisation."""
    token_table: Table = "frozen"
    """Whether hint tokens are looked up in a trainable copy of the embedding table."""
    soft_length: int = 0
    """Vectors of a soft prompt before the hint, trained together with it and the same for every pair."""


@dataclass(frozen=True)
class Authors(Config):
    """Options of Q-PEFT-R, with the defaults of the authors' code."""

    similarity_table: Table = "trainable"
    token_filter: str = "d"
    template_tokens: bool = True
    mlp_init: Init = "default"
    token_table: Table = "trainable"


def build(config: Config, lm: CausalLM) -> Adapter:
    """Return an untrained module for a model.

    Raises:
        OptionError: options out of range, or that contradict each other.
    """
    from qpeft.adapters._qpeft_r import QPeftR  # torch, only when there is work

    return QPeftR(config, lm)
