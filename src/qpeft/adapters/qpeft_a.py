"""Q-PEFT-A: every query token attends to the passage's tokens, and what it reads stands as a hint (arXiv 2404.04522).

    A = MultiheadAttention( E[q], E[x], E[x] )        one vector per query token
    s = MLP( [ E[prefix] ; A ; E[suffix] ] )

The query acts through the attention weights alone, the content is the passage's: a passage that lacks the matter
cannot supply it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from qpeft.adapters._attention import AttentionInit, CosineAttention, DefaultAttention
from qpeft.adapters._base import HintNetwork, Init, Markers, PromptAdapter, Table, whole_table
from qpeft.adapters._token_filter import TokenFilter
from qpeft.hints import Hints, Pairs
from qpeft.lm import CausalLM


@dataclass(frozen=True)
class Config:
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
    """Words after the hint."""
    mlp_layers: int = 1
    """Depth of the network that hint vectors pass through; 0: none."""
    mlp_hidden: int = 64
    """Width of its bottleneck (residual_zero)."""
    mlp_init: Init = "residual_zero"
    """residual_zero: changes nothing at the start; default: full width, PyTorch's initialisation."""
    token_table: Table = "frozen"
    """Whether query and markers are looked up in a trainable copy of the embedding table."""


@dataclass(frozen=True)
class Authors(Config):
    """Options of Q-PEFT-A, with the defaults of the authors' code."""

    attn_init: AttentionInit = "default"
    attn_dropout: float = 0.1
    template_tokens: bool = True
    mlp_init: Init = "default"
    token_table: Table = "trainable"


def build(config: Config, lm: CausalLM) -> PromptAdapter:
    """Return an untrained module for a model.

    Raises:
        OptionError: options out of range.
    """
    return QPeftA(config, lm)


class QPeftA(PromptAdapter):
    """The module; see above.

    Args:
        config: options.
        lm: the frozen model.
        reads_layer: hidden states that keys and values read besides embeddings, for `qpeft_c`.
    """

    def __init__(self, config: Config, lm: CausalLM, reads_layer: int | None = None) -> None:
        super().__init__(lm, config.token_table)
        self.config = config
        self.reads_layer = reads_layer
        self.reads_template = config.template_tokens
        self.markers = Markers(lm.tokenizer, config.hint_prefix, config.hint_suffix, lm.device)
        self.filter = TokenFilter(config.token_filter, lm.tokenizer, lm.embeddings.weight.shape[0], lm.device)
        self.attention: nn.Module
        if config.attn_init == "default":
            self.attention = DefaultAttention(self.width, config.num_heads, config.attn_dropout)
        else:
            self.attention = CosineAttention(
                whole_table(lm),
                config.num_heads,
                config.attn_dim,
                config.attn_sharpness,
                config.attn_dropout,
                self.scale,
                context=0 if reads_layer is None else lm.model.config.get_text_config().hidden_size,
            )
        self.network = HintNetwork(self.width, config.mlp_hidden, config.mlp_layers, config.mlp_init, self.scale)
        self.to(lm.device)

    def hint_length(self, query_tokens: int) -> int:
        """Return the query's tokens and the markers."""
        return query_tokens + len(self.markers)

    def forward(self, pairs: Pairs) -> Hints:
        """Attend and write."""
        allowed = self.filter(pairs.query, pairs.query_mask, pairs.passage, pairs.passage_mask)
        read, weights = self.attention(
            self.look_up(pairs.query), self.look_up_frozen(pairs.passage), allowed, pairs.states
        )
        vectors, mask = self.markers.around(read, pairs.query_mask, self)
        return Hints(self.network(vectors), mask, attention=weights)
