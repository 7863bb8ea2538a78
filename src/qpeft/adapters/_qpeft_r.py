"""The module behind qpeft_r.py: Q-PEFT-R."""

from __future__ import annotations

import torch
from torch import Tensor

from qpeft.adapter import Hints, Pairs, PromptAdapter
from qpeft.adapters._parts import HintNetwork, Markers
from qpeft.adapters._soft_prompt import beside_a_hint
from qpeft.adapters._token_filter import TokenFilter, first_occurrences
from qpeft.adapters.qpeft_r import Config
from qpeft.errors import OptionError, at_least
from qpeft.lm.causal import CausalLM

PRIME = 2**31 - 1


class QPeftR(PromptAdapter):
    """The module; see qpeft_r.py."""

    config: Config

    def __init__(self, config: Config, lm: CausalLM) -> None:
        at_least(1, k=config.k)
        if config.similarity_table == "trainable" and config.token_table == "frozen":
            raise OptionError("--similarity-table trainable needs --token-table trainable")
        super().__init__(lm, lookup=config.token_table)
        self.config = config
        self.reads_template = config.template_tokens
        self.markers = Markers(lm.tokenizer, config.hint_prefix, config.hint_suffix, lm.device)
        self.filter = TokenFilter(config.token_filter, lm.tokenizer, lm.embeddings.weight.shape[0], lm.device)
        self.network = HintNetwork(self.width, config.mlp_hidden, config.mlp_layers, config.mlp_init, self.scale)
        self.soft = beside_a_hint(config.soft_length, lm)
        self.to(lm.device)

    def hint_length(self, query_tokens: int) -> int:
        """Return k, the markers, and the vectors before them."""
        return self.config.soft_length + self.config.k + len(self.markers)

    def forward(self, pairs: Pairs) -> Hints:
        """Choose tokens and write them."""
        chosen = self.choose(pairs)
        ids = pairs.passage.gather(1, chosen.clamp(min=0))
        vectors, mask = self.markers.around(self.look_up(ids), chosen >= 0, self)
        hints = Hints(self.network(vectors), mask, chosen=chosen)
        return hints if self.soft is None else self.soft.before(pairs, hints)

    @torch.no_grad()
    def choose(self, pairs: Pairs) -> Tensor:
        """Return the positions of the chosen passage tokens, best first, `[B, k]`; −1 where there are no more."""
        allowed = self.filter(pairs.query, pairs.query_mask, pairs.passage, pairs.passage_mask)
        if self.config.select == "random":
            scores = _scatter(pairs, self.config.select_seed)[:, None]
        else:
            scores = self._similarities(pairs)
        if self.filter.distinct:
            allowed = first_occurrences(pairs.passage, allowed)
            scores = scores.amax(1, keepdim=True)
        scores = scores.masked_fill(~allowed[:, None], -torch.inf).flatten(1)
        order = scores.sort(dim=1, descending=True, stable=True)
        k = min(self.config.k, scores.shape[1])
        places = order.indices[:, :k] % pairs.passage.shape[1]
        return places.masked_fill(order.values[:, :k] == -torch.inf, -1)

    def _similarities(self, pairs: Pairs) -> Tensor:
        """Return `[B, n, m]`, −∞ for padded query tokens."""
        look_up = self.look_up if self.config.similarity_table == "trainable" else self.look_up_frozen
        query, passage = look_up(pairs.query), self.look_up_frozen(pairs.passage)
        if self.config.similarity == "cosine":
            query, passage = torch.nn.functional.normalize(query, dim=2), torch.nn.functional.normalize(passage, dim=2)
        scores = query @ passage.transpose(1, 2)
        if self.config.similarity == "cosine":
            # Products of equal vectors differ in their last bits with the shape of the batch; ties should be ties.
            scores = (scores * 1e4).round() / 1e4
        return scores.masked_fill(~pairs.query_mask[:, :, None], -torch.inf)


def _scatter(pairs: Pairs, seed: int) -> Tensor:
    """Return a pseudo-random number for each passage token, `[B, m]`, that depends on token, query and seed alone.

    Adding what belongs to the query only turns one order of all tokens, which is what seed 0 does. With other seeds
    x → x^5 comes after it, twice: a permutation, so that no two tokens meet, and far from linear.
    """
    salt = (pairs.query * pairs.query_mask * 7919).sum(1, keepdim=True)
    mixed = (pairs.passage * 1_103_515_245 + salt * 12_345) % PRIME
    for turn in (1, 2) if seed else ():
        mixed = (mixed + turn * seed * 69_621) % PRIME
        squared = mixed * mixed % PRIME
        mixed = squared * squared % PRIME * mixed % PRIME
    return (mixed * 48_271 % PRIME).double()
