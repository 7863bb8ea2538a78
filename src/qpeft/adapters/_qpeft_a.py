"""The module behind qpeft_a.py: Q-PEFT-A and -C."""

from __future__ import annotations

from torch import nn

from qpeft.adapter import Hints, Pairs, PromptAdapter, whole_table
from qpeft.adapters._attention import CosineAttention, DefaultAttention
from qpeft.adapters._parts import HintNetwork, Markers
from qpeft.adapters._soft_prompt import beside_a_hint
from qpeft.adapters._token_filter import TokenFilter
from qpeft.adapters.qpeft_a import Config
from qpeft.lm.causal import CausalLM


class QPeftA(PromptAdapter):
    """The module; see qpeft_a.py.

    Args:
        config: options.
        lm: the frozen model.
        reads_layer: hidden states that keys and values read besides embeddings, for `qpeft_c`.
    """

    config: Config

    def __init__(self, config: Config, lm: CausalLM, reads_layer: int | None = None) -> None:
        table = whole_table(lm)
        super().__init__(lm, table, lookup=config.token_table)
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
                table,
                config.num_heads,
                config.attn_dim,
                config.attn_sharpness,
                config.attn_dropout,
                self.scale,
                context=0 if reads_layer is None else lm.width(reads_layer),
            )
        self.network = HintNetwork(self.width, config.mlp_hidden, config.mlp_layers, config.mlp_init, self.scale)
        self.soft = beside_a_hint(config.soft_length, lm)
        self.to(lm.device)

    def hint_length(self, query_tokens: int) -> int:
        """Return the query's tokens, the markers, and the vectors before them."""
        return self.config.soft_length + query_tokens + len(self.markers)

    def forward(self, pairs: Pairs) -> Hints:
        """Attend and write."""
        allowed = self.filter(pairs.query, pairs.query_mask, pairs.passage, pairs.passage_mask)
        read, weights = self.attention(
            self.look_up(pairs.query), self.look_up_frozen(pairs.passage), allowed, pairs.states
        )
        vectors, mask = self.markers.around(read, pairs.query_mask, self)
        hints = Hints(self.network(vectors), mask, attention=weights)
        return hints if self.soft is None else self.soft.before(pairs, hints)
