"""Encoding of contexts: what stands before hint and query goes through the model once, alone or with others.

Shapes: `T` context positions, `d` hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from transformers import DynamicCache

from qpeft.context_store import ContextStore, Encoded, Filled, Key, filled_layers
from qpeft.flops import context_flops, decoder_flops
from qpeft.pretrained import ALIKE, PretrainedLM
from qpeft.waiting import Waiting

MULTIPLE = 16
"""Contexts that are encoded together are padded to such a width; see `lm.MULTIPLE`."""
TOGETHER = 2_048
"""Tokens of contexts that a CPU encodes in one forward pass: more are no quicker."""


class ContextEncoder(PretrainedLM):
    """A decoder that encodes contexts.

    Attributes:
        store: keeps them, if there is one.
    """

    store: ContextStore | None = None
    _depth: int
    """Layers that are run."""

    def _make_room(self) -> bool:
        if self.store is None or not self.store.bytes_kept:
            return False
        self.store.clear()
        return True

    def encode_all(self, contexts: Sequence[tuple[int, ...]], layer: int | None = None) -> list[Encoded]:
        """Return `encode` of each context.

        What a CPU keeps is encoded one by one, and always by the same number of threads, since the last bits depend on
        both: so they are the same whoever asks, and when. Anything else is encoded in batches.
        """
        if self.device.type != "cpu" or self.store is None or not self.store.keeps:
            return self._encode_together(contexts, layer)
        if self._beside.is_inside or self._beside.width() == 1:
            return [self.encode(ids, layer) for ids in contexts]
        return self._beside.run(lambda ids: self.encode(ids, layer), contexts)

    def _encode_together(self, contexts: Sequence[tuple[int, ...]], layer: int | None) -> list[Encoded]:
        """Return each context's encoding; those that are not kept are encoded in batches."""
        store = self.store
        missing = [ids for ids in dict.fromkeys(contexts) if store is None or not store.has(self.key(ids, layer))]
        on_cpu = self.device.type == "cpu"
        waiting = Waiting([len(ids) for ids in missing], [0] * len(missing), 1, ALIKE if on_cpu else 1)
        beside = self._beside.width() if on_cpu and not self._beside.is_inside else 1
        most = TOGETHER if on_cpu else self.batch_tokens
        share = min(most, -(-sum(map(len, missing)) // beside))
        batches = [[missing[i] for i in batch] for batch in waiting.batches(share, 1)]
        if beside > 1:
            found = self._beside.run(lambda some: self._encode(some, layer), batches)
        else:
            found = [self._encode(some, layer) for some in batches]
        fresh = dict(zip((ids for batch in batches for ids in batch), (e for some in found for e in some), strict=True))
        return [fresh[ids] if store is None else self._kept(store, ids, layer, fresh.get(ids)) for ids in contexts]

    def encode(self, ids: tuple[int, ...], layer: int | None = None) -> Encoded:
        """Return keys and values of a context, from the store if there is one.

        Args:
            ids: the context's tokens.
            layer: also return the hidden states after so many layers.
        """
        return self._encode([ids], layer)[0] if self.store is None else self._kept(self.store, ids, layer)

    def _kept(
        self, store: ContextStore, ids: tuple[int, ...], layer: int | None, fresh: Encoded | None = None
    ) -> Encoded:
        """Return a context from the store, where it is put if it is not there."""
        found = store.get(self.key(ids, layer), lambda: self._encode([ids], layer)[0] if fresh is None else fresh)
        return found.to(self.device)

    def key(self, ids: tuple[int, ...], layer: int | None = None) -> Key:
        """Return under which key a context is stored."""
        return ids, layer, self._depth

    @torch.no_grad()
    def _encode(self, contexts: Sequence[tuple[int, ...]], layer: int | None) -> list[Encoded]:
        """Encode contexts in one forward pass, padded on the right, where it is not seen."""
        lengths = [len(ids) for ids in contexts]
        width = max(lengths)
        if len(contexts) > 1:
            width += -width % MULTIPLE
        ids = torch.zeros(len(contexts), width, dtype=torch.long)
        for row, own in zip(ids, contexts, strict=True):
            row[: len(own)] = torch.tensor(own)
        cache: Any = DynamicCache()
        if layer is None:
            cache.layers = filled_layers(self._depth)
        states = None
        with suppress(Filled):
            out = self.model(
                input_ids=ids.to(self.device),
                position_ids=torch.arange(width, device=self.device)[None],
                past_key_values=cache,
                use_cache=True,
                output_hidden_states=layer is not None,
                logits_to_keep=1,
            )
            states = None if layer is None else out.hidden_states[layer]
        flops = None
        if self.shape is not None and layer is None:
            flops = sum(context_flops(self.shape, length, self._depth) for length in lengths)
        elif self.shape is not None:
            flops = decoder_flops(self.shape, [(length, 0) for length in lengths], len(lengths), self._depth)
        self._count(sum(lengths), ids.numel() - sum(lengths), flops)
        return [
            Encoded(
                torch.stack([torch.stack([kept.keys[i, :, :n], kept.values[i, :, :n]]) for kept in cache.layers]),
                None if states is None else states[i, :n].clone(),
            )
            for i, n in enumerate(lengths)
        ]
