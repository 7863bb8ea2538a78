"""Contexts that were encoded before, as the cache of a batch: what its rows go on from.

Shapes: `B` rows, `T` positions of a context, `H` heads, `h` head size.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from qpeft.lm import cpu_attention
from qpeft.lm.agreement import agree
from qpeft.lm.context_store import keeps_all
from qpeft.lm.cpu_attention import Contexts

TRIED = (((3, 4, 5, 6, 7), (8, 9)), ((10, 11), (12, 13)))
"""Contexts of unlike lengths, and what follows them."""


class Past:
    """Makes caches of contexts for one model: stacked, or apart where its attention reads them one by one.

    Args:
        model: a decoder.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._hands_on: bool | None = None

    @functools.cached_property
    def goes_on(self) -> bool:
        """Whether the model goes on from contexts of unlike lengths as if it had just read them; tried once.

        One that remembers more than keys and values does not, nor one that counts positions by itself.
        """
        return keeps_all(self._model) and self._goes_on()

    @torch.no_grad()
    def _goes_on(self) -> bool:
        device, size = self._model.device, self._model.config.get_text_config().vocab_size
        rows = [[torch.tensor([part], device=device) % size for part in row] for row in TRIED]
        whole, contexts = [], []
        for before, after in rows:
            ids = torch.cat([before, after], 1)
            positions = torch.arange(ids.shape[1], device=device)[None]
            logits = self._model(input_ids=ids, position_ids=positions, use_cache=False).logits
            if logits.dim() != 3:  # a classifier, which reads rows whole
                return True
            whole.append(logits[:, -after.shape[1] :])
            cache: Any = DynamicCache()
            positions = positions[:, : before.shape[1]]
            self._model(input_ids=before, position_ids=positions, past_key_values=cache, use_cache=True)
            contexts.append(torch.stack([torch.cat([layer.keys, layer.values]) for layer in cache.layers]))
        following = torch.cat([after for _, after in rows])
        found = self._model(input_ids=following, **self.inputs(contexts, torch.ones_like(following))).logits
        return agree(torch.cat(whole), found, self._model)

    def inputs(self, contexts: Sequence[Tensor], mask: Tensor) -> dict[str, Any]:
        """Return what a forward pass takes beside the tokens that follow contexts.

        Args:
            contexts: of each row, `[layers, 2, H, T, h]`.
            mask: `[B, S]`, 1 where a token follows; shorter rows are padded on the right.
        """
        lengths = [context.shape[3] for context in contexts]
        past = max(lengths)
        before = mask.new_zeros(len(contexts), past)
        for i, length in enumerate(lengths):
            before[i, past - length :] = 1
        whole = torch.cat([before, mask], 1)
        device = self._model.device
        return {
            "attention_mask": whole.to(device),
            "position_ids": (whole.cumsum(1) - 1).clamp(min=0)[:, past:].to(device),
            "past_key_values": self.cache(contexts, mask.shape[1]),
            "use_cache": True,
        }

    @property
    def apart(self) -> bool:
        """Whether contexts stay apart, if the model's layers allow it."""
        return bool(self._model.config._attn_implementation == cpu_attention.NAME)

    def cache(self, contexts: Sequence[Tensor], width: int) -> DynamicCache:
        """Return contexts `[layers, 2, H, T, h]`, padded on the left so that they end together, as a cache.

        Args:
            contexts: of each row.
            width: positions that follow.
        """
        cache = DynamicCache()
        if self.apart and self._layers_hand_on(contexts[0]):
            cache.layers = [*_apart(contexts)]
        else:
            cache.layers = [*_stacked(contexts, width)]
        return cache

    @torch.no_grad()
    def _layers_hand_on(self, context: Tensor) -> bool:
        """Whether the layers hand the cache's keys and values to attention as they are; tried once."""
        if self._hands_on is None:
            past = torch.tensor([[context.shape[3]]], device=context.device)
            mask = past.new_ones(1, context.shape[3] + 1)
            logits = []
            try:
                for layers in (_apart([context]), _stacked([context], 1)):
                    cache = DynamicCache()
                    cache.layers = [*layers]
                    given = {"attention_mask": mask, "position_ids": past, "past_key_values": cache}
                    logits.append(self._model(input_ids=past * 0, **given).logits)
                self._hands_on = agree(logits[0], logits[1], self._model)
            except Exception:  # keys without their contexts do not fit the mask, whatever that ends in
                self._hands_on = False
        return self._hands_on


def _apart(contexts: Sequence[Tensor]) -> list[ApartLayer]:
    return [ApartLayer(Contexts(rows)) for rows in zip(*contexts, strict=True)]


def _stacked(contexts: Sequence[Tensor], width: int) -> list[FilledLayer]:
    training = torch.is_grad_enabled()
    layers, _, heads, _, size = contexts[0].shape
    past = max(context.shape[3] for context in contexts)
    room = past + (0 if training else width)
    stacked = contexts[0].new_zeros(layers, 2, len(contexts), heads, room, size)
    for i, context in enumerate(contexts):
        stacked[:, :, i, :, past - context.shape[3] : past] = context
    return [FilledLayer(layer[0], layer[1], past, grows=training) for layer in stacked]


class FilledLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A layer of a cache that holds its contexts, and takes what follows: into room left for it, or by growing.

    Writing in place is quicker, but backpropagation needs what was there, so training grows.
    """

    def __init__(self, keys: Tensor, values: Tensor, past: int, *, grows: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lazy_initialization(keys, values)
        self.keys = self._keys = keys
        self.values = self._values = values
        self._past = past
        self._grows = grows

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return the layer's keys and values with new ones behind them."""
        if self._grows:
            return torch.cat([self._keys, key_states], -2), torch.cat([self._values, value_states], -2)
        self._keys[:, :, self._past :] = key_states
        self._values[:, :, self._past :] = value_states
        return self._keys, self._values

    def get_seq_length(self) -> int:
        """Return how many positions stand before the input."""
        return self._past


class ApartLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A layer of a cache whose contexts stay as they are kept, each by itself, for `cpu_attention` to join.

    Copying all of them into one tensor first costs as much as attention itself.
    """

    def __init__(self, contexts: Contexts) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lazy_initialization(contexts.rows[0], contexts.rows[0])
        self._contexts = contexts

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return the new keys and values, with the contexts as an attribute of the keys."""
        key_states.contexts = self._contexts  # type: ignore[attr-defined]
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Return how many positions stand before the input."""
        return self._contexts.longest
