"""The module behind passage_prompt.py: passage prompt."""

from __future__ import annotations

import torch
from torch import nn

from qpeft.adapter import Hints, Pairs, PromptAdapter, whole_table
from qpeft.adapters._attention import CosineAttention
from qpeft.adapters._parts import HintNetwork
from qpeft.adapters.passage_prompt import Config
from qpeft.errors import at_least
from qpeft.lm.causal import CausalLM


class PassagePrompt(PromptAdapter):
    """The module; see passage_prompt.py."""

    config: Config

    def __init__(self, config: Config, lm: CausalLM) -> None:
        at_least(1, k=config.k, most=config.most)
        table = whole_table(lm)
        super().__init__(lm, table)
        self.config = config
        ids = lm.tokenizer(config.instruction, add_special_tokens=False)["input_ids"] if config.instruction else []
        self.instruction = nn.Parameter(table[torch.tensor(ids, dtype=torch.long)] / self.scale)
        self.attention = None
        # Where half of the context is kept for hints, the passage has no more tokens than that.
        self.most = config.k if config.form == "attend" else config.most or -(-lm.max_length // 2)
        if config.form == "attend":
            draw = torch.randint(len(table), (config.k,), generator=torch.Generator().manual_seed(config.init_seed))
            self.readers = nn.Parameter(table[draw.to(table.device)] / self.scale)
            self.attention = CosineAttention(table, config.num_heads, config.attn_dim, 10.0, 0.0, self.scale)
        self.network = HintNetwork(self.width, config.mlp_hidden, 1, "residual_zero", self.scale)
        self.to(lm.device)

    def hint_length(self, query_tokens: int) -> int:
        """Return the most vectors that there can be, and the instruction."""
        return self.most + len(self.instruction)

    def forward(self, pairs: Pairs) -> Hints:
        """Read the passage and write."""
        rows = len(pairs.passage)
        passage = self.look_up_frozen(pairs.passage)
        weights = None
        if self.attention is None:
            content, mask = passage[:, : self.most], pairs.passage_mask[:, : self.most]
        else:
            readers = (self.scale * self.readers).expand(rows, -1, -1)
            content, weights = self.attention(readers, passage, pairs.passage_mask)
            mask = torch.ones(content.shape[:2], dtype=torch.bool, device=content.device)
        before = (self.scale * self.instruction).expand(rows, -1, -1)
        ones = mask.new_ones(rows, before.shape[1])
        return Hints(torch.cat([before, self.network(content)], 1), torch.cat([ones, mask], 1), attention=weights)
