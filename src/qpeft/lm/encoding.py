"""Encoding of contexts: what stands before hint and query goes through the model once, alone or with others.

Shapes: `T` context positions, `d` hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from qpeft.lm.context_store import ContextStore, Encoded, Filled, Key, filled_layers
from qpeft.lm.flops import context_flops, decoder_flops
from qpeft.lm.pretrained import ALIKE, PretrainedLM
from qpeft.lm.waiting import Waiting

MULTIPLE = 16
"""Contexts that are encoded together are padded to such a width; see `lm.MULTIPLE`."""
AHEAD = 256
"""Rows whose contexts are encoded together before they are scored, so that many have one width."""
TOGETHER = 2_048
"""Tokens of contexts that a CPU encodes in one forward pass: more are no quicker."""
LEAST = 16
"""Fewer than so many would be of as many widths."""


class ContextEncoder(PretrainedLM):
    """A decoder that encodes contexts, and keeps them if it has a store."""

    repeatable: bool = True
    """Whether what a CPU keeps has the same bits whoever asks, and when. Where nobody needs that, few contexts are
    encoded without rows of padding beside them."""
    _depth: int
    """Layers that are run."""

    def _make_room(self) -> bool:
        if self.store is None or not self.store.bytes_kept:
            return False
        self.store.clear()
        return True

    def encode(self, ids: tuple[int, ...], layer: int | None = None) -> Encoded:
        """Return keys and values of a context, from the store if there is one.

        Args:
            ids: the context's tokens.
            layer: also return the hidden states after so many layers.
        """
        return self.encode_all([ids], layer)[0]

    def encode_all(self, contexts: Sequence[tuple[int, ...]], layer: int | None = None) -> list[Encoded]:
        """Return `encode` of each context; those that are not kept are encoded in batches."""
        store, fresh = self.store, self._encode_missing(contexts, layer)
        return [fresh[ids] if store is None else self._kept(store, ids, layer, fresh.get(ids)) for ids in contexts]

    def encode_ahead(self, contexts: Sequence[tuple[int, ...]], layer: int | None = None) -> None:
        """Put into the store what it lacks of some contexts."""
        assert self.store is not None
        for ids, encoded in self._encode_missing(contexts, layer).items():
            self.store.put(self.key(ids, layer), encoded)

    def _ahead(self, lengths: Sequence[int]) -> int:
        """Return how many of the first contexts may be encoded ahead: as many as half of the store holds, 0 if few.

        What goes to disk need not be held.
        """
        assert self.store is not None
        if self.store.folder is not None:
            return len(lengths)
        room = self.store.capacity // 2 // self.store.token_bytes
        fit = sum(tokens <= room for tokens in accumulate(lengths))
        return fit if fit >= min(LEAST, len(lengths)) else 0

    def _encode_missing(self, contexts: Sequence[tuple[int, ...]], layer: int | None) -> dict[tuple[int, ...], Encoded]:
        """Return those that the store lacks, encoded in batches."""
        store = self.store
        missing = [ids for ids in dict.fromkeys(contexts) if store is None or not store.has(self.key(ids, layer))]
        if not missing:
            return {}
        on_cpu = self.device.type == "cpu"
        beside = self._beside.width() if on_cpu and not self._beside.is_inside else 1
        if self._alike:
            batches = self._batches_alike(missing)
        else:
            waiting = Waiting([len(ids) for ids in missing], [0] * len(missing), 1, ALIKE if on_cpu else 1)
            most = beside * (TOGETHER if on_cpu else self.batch_tokens)
            count = beside * math.ceil(sum(map(len, missing)) / most)  # as in _in_batches
            batches = [[missing[i] for i in batch] for batch in waiting.batches(count, 1)]
        if beside > 1:
            found = self._beside.run(lambda some: self._encode(some, layer), batches)
        else:
            found = [self._encode(some, layer) for some in batches]
        return dict(zip((ids for batch in batches for ids in batch), (e for some in found for e in some), strict=True))

    @property
    def keeps_contexts(self) -> bool:
        """Whether a CPU encodes contexts to keep them."""
        return self.device.type == "cpu" and self.store is not None and self.store.keeps

    @property
    def _alike(self) -> bool:
        """Whether a context is always encoded in a batch of the same shape.

        Its last bits depend on the shape, and on the number of threads, which is always that of a batch beside others;
        on the batch's other rows and its own place among them they do not.
        """
        return self.repeatable and self.keeps_contexts

    def _alike_shape(self, length: int) -> tuple[int, int]:
        """Return rows and width of the batch that a context of so many tokens is encoded in.

        Of experts each reads the tokens that were sent to it, whichever row they stand in; so there, contexts go alone.
        """
        if getattr(self.model.config.get_text_config(), "num_experts_per_tok", None):
            return 1, length
        width = length + -length % MULTIPLE
        return min(ALIKE, max(1, TOGETHER // width)), width

    def _batches_alike(self, contexts: Sequence[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
        """Return contexts in batches of one shape, the widest first."""
        by_shape: dict[tuple[int, int], list[tuple[int, ...]]] = {}
        for ids in sorted(contexts, key=len, reverse=True):
            by_shape.setdefault(self._alike_shape(len(ids)), []).append(ids)
        return [own[i : i + rows] for (rows, _), own in by_shape.items() for i in range(0, len(own), rows)]

    def _kept(
        self, store: ContextStore, ids: tuple[int, ...], layer: int | None, fresh: Encoded | None = None
    ) -> Encoded:
        """Return a context from the store, where it is put if it is not there."""
        found = store.get(self.key(ids, layer), lambda: self._encode([ids], layer)[0] if fresh is None else fresh)
        return found.to(self.device)

    def _positions(self, width: int, longest: int) -> Tensor:
        """Return positions `[1, width]` of rows padded on the right; padding gets none that the model does not have."""
        return torch.arange(width, device=self.device).clamp(max=max(self.max_length, longest) - 1)[None]

    def key(self, ids: tuple[int, ...], layer: int | None = None) -> Key:
        """Return under which key a context is stored."""
        return ids, layer, self._depth

    @torch.no_grad()
    def _encode(self, contexts: Sequence[tuple[int, ...]], layer: int | None) -> list[Encoded]:
        """Encode contexts in one forward pass, padded on the right, where it is not seen, and with rows of padding."""
        lengths = [len(ids) for ids in contexts]
        rows, width = len(contexts), max(lengths)
        if self._alike:
            rows, width = self._alike_shape(width)
        elif rows > 1:
            width += -width % MULTIPLE
        ids = torch.zeros(rows, width, dtype=torch.long)
        for row, own in zip(ids, contexts, strict=False):
            row[: len(own)] = torch.tensor(own)
        cache: Any = DynamicCache()
        if layer is None:
            cache.layers = filled_layers(self._depth)
        states = None
        with suppress(Filled):
            out = self.model(
                input_ids=ids.to(self.device),
                position_ids=self._positions(width, max(lengths)),
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
