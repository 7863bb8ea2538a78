"""Passages encoded once: a causal LM that keeps what it computed for everything that stands before the query.

In a decoder, keys and values of the context do not depend on what follows. So a passage that is a candidate of many
queries is encoded for the first of them, and every other one costs only its own few tokens:

    [BOS] Passage: …  |  last context token · cue · query
    kept, per passage      computed, per pair

Each context is encoded alone and unpadded. What is kept is therefore the same in whatever order queries come, and an
interrupted run that starts again with an empty cache gives the same bits.

Shapes: `B` rows, `T` context positions, `S` suffix positions, `H` heads, `h` head size.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from qpeft.errors import ModelError
from qpeft.lm import CausalLM, PretrainedLM, RowLogProbs, token_log_probs
from qpeft.template import Row


class CachedCausalLM(PretrainedLM):
    """A `CausalLM` with a least-recently-used store of encoded contexts.

    Args:
        lm: does the work.
        capacity: bytes of keys and values that may be kept.
        batch_tokens: padded tokens (context and suffix) that one forward pass over cached contexts may span.

    Raises:
        ModelError: what the model remembers of a context is more than keys and values (Mamba and the like).
    """

    has_encoder = False

    def __init__(self, lm: CausalLM, capacity: int, batch_tokens: int = 32_768) -> None:
        kinds = getattr(lm.model.config.get_text_config(), "layer_types", None) or ()
        if lm.model._is_stateful or not set(kinds) <= {"full_attention", "sliding_attention"}:
            raise ModelError(f"{lm.name}: the passage cache is for models whose layers are all attention")
        super().__init__(lm.model, lm.tokenizer, name=lm.name, max_length=lm.max_length, batch_tokens=batch_tokens)
        self._lm = lm
        self._capacity = capacity
        self._kept: OrderedDict[tuple[int, ...], Tensor] = OrderedDict()
        self.bytes_kept = 0
        self.hits = 0
        self.misses = 0

    def log_probs(self, rows: Sequence[Row], *, with_passage: bool = False) -> list[RowLogProbs]:
        """Return the log-probabilities of each row's scored tokens, in order; see `CausalLM.log_probs`.

        The passage's own probabilities need its whole forward pass, so `with_passage` bypasses the cache.
        """
        if with_passage or any(len(row.context) < 2 for row in rows):
            return self._lm.log_probs(rows, with_passage=with_passage)
        return super().log_probs(rows)

    def _forward(self, rows: Sequence[Row], with_passage: bool) -> list[RowLogProbs]:
        device = self.device
        contexts = [self._context(row.context[:-1]) for row in rows]
        past = max(context.shape[-2] for context in contexts)
        width = max(len(row.target) for row in rows)
        layers, _, heads, _, size = contexts[0].shape
        stacked = contexts[0].new_zeros(layers, 2, len(rows), heads, past, size)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros(len(rows), past + width, dtype=torch.long)
        scored = torch.zeros(len(rows), width, dtype=torch.bool)
        targets = torch.zeros(len(rows), width, dtype=torch.long)
        for i, (row, context) in enumerate(zip(rows, contexts, strict=True)):
            length, k = context.shape[-2], len(row.target)
            stacked[:, :, i, :, past - length :] = context
            ids[i, :k] = torch.tensor((row.context[-1], *row.target[:-1]))
            targets[i, :k] = torch.tensor(row.target)
            scored[i, :k] = torch.tensor(row.scored)
            mask[i, past - length : past + k] = 1
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, past:]
        logits = self._lm.model(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            position_ids=positions.to(device),
            past_key_values=_cache(stacked),
            use_cache=True,
            logits_to_keep=scored.to(device),
        ).logits
        values = token_log_probs(logits.reshape(-1, logits.shape[-1]), targets[scored].to(device)).cpu()
        return [RowLogProbs(value) for value in torch.split(values, scored.sum(1).tolist())]

    def _context(self, ids: tuple[int, ...]) -> Tensor:
        """Return the keys and values of a context, `[layers, 2, H, T, h]`, from the store or by encoding it."""
        kept = self._kept.get(ids)
        if kept is not None:
            self.hits += 1
            self._kept.move_to_end(ids)
            return kept
        self.misses += 1
        row = torch.tensor([ids], device=self.device)
        nothing = torch.zeros_like(row, dtype=torch.bool)
        cache = self._lm.model(
            input_ids=row,
            position_ids=torch.arange(len(ids), device=self.device)[None],
            past_key_values=DynamicCache(),
            use_cache=True,
            logits_to_keep=nothing,
        ).past_key_values
        encoded = torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers])
        self._keep(ids, encoded)
        return encoded

    def _keep(self, ids: tuple[int, ...], encoded: Tensor) -> None:
        if encoded.nbytes > self._capacity:
            return
        self._kept[ids] = encoded
        self.bytes_kept += encoded.nbytes
        while self.bytes_kept > self._capacity:
            _, oldest = self._kept.popitem(last=False)
            self.bytes_kept -= oldest.nbytes


def _cache(stacked: Tensor) -> Any:
    """Return `[layers, 2, B, H, T, h]` as the cache object that models take."""
    cache = DynamicCache()
    for number, layer in enumerate(stacked):
        cache.update(layer[0], layer[1], number)
    return cache
