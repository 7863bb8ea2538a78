"""Frozen language models that say how likely given tokens are.

Shapes: `B` rows, `T` positions, `N` scored positions of a batch, `K` scored positions of a row, `V` vocabulary.

Rows are sorted by length, padded within batches that hold a bounded number of tokens, and come back in the order given.
Positions are explicit and padding is masked, so that a row's values do not depend on its company. The model's own head
runs at the scored positions only, which keeps the memory small and soft-capped or scaled heads right.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

from qpeft.context_store import ContextStore, Encoded, FilledLayer
from qpeft.errors import ModelError, OptionError
from qpeft.hints import HintWriter, Pairs, Slots
from qpeft.layout import Layout, PaddingSide, lay_out
from qpeft.provenance import weights_fingerprint
from qpeft.template import Row


@dataclass(frozen=True, slots=True)
class RowLogProbs:
    """Natural log-probabilities of a row's tokens, float32 on the CPU.

    `target` `[K]` are the scored target tokens; `passage` `[m]` the passage's tokens, where they were asked for.
    """

    target: Tensor
    passage: Tensor | None = None


class LanguageModel(Protocol):
    """What methods need of a model."""

    name: str
    tokenizer: Any
    max_length: int
    has_encoder: bool

    @property
    def device(self) -> torch.device:
        """Where inputs are sent."""
        ...

    @property
    def dtype(self) -> str:
        """Name of the weights' type."""
        ...

    @property
    def revision(self) -> str | None:
        """Commit on the model hub, if the model came from there."""
        ...

    @property
    def sha256(self) -> str | None:
        """Hash of the weights, if the model came from a folder."""
        ...

    def log_probs(
        self,
        rows: Sequence[Row],
        *,
        with_passage: bool = False,
        adapters: HintWriter | Sequence[HintWriter | None] | None = None,
    ) -> list[RowLogProbs]:
        """Return the log-probabilities of each row's scored tokens, in order."""
        ...


class PretrainedLM:
    """What decoder-only and encoder-decoder models share: batches, memory, order."""

    has_encoder: bool

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        name: str,
        max_length: int,
        batch_tokens: int,
        folder: Path | None = None,
    ) -> None:
        self.name = name
        self._folder = folder
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.model = model.eval().requires_grad_(False)
        self._batch_tokens = batch_tokens
        self._budget = batch_tokens  # halved when memory runs out, grows back afterwards

    @property
    def device(self) -> torch.device:
        """Where inputs are sent."""
        return torch.device(self.model.device)

    @property
    def dtype(self) -> str:
        """Name of the weights' type, as the option `--dtype` spells it."""
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def revision(self) -> str | None:
        """Commit on the model hub, if the model came from there."""
        commit: str | None = getattr(self.model.config, "_commit_hash", None)
        return commit

    @functools.cached_property
    def sha256(self) -> str | None:
        """Hash of the weight files and the configuration; None for a model that came from the hub or from memory."""
        return None if self._folder is None else weights_fingerprint(self._folder)

    @torch.no_grad()
    def log_probs(
        self,
        rows: Sequence[Row],
        *,
        with_passage: bool = False,
        adapters: HintWriter | Sequence[HintWriter | None] | None = None,
    ) -> list[RowLogProbs]:
        """Return the log-probabilities of each row's scored tokens, in order.

        Args:
            rows: token ids, of any lengths.
            with_passage: also return those of the passage's tokens (decoder-only models).
            adapters: what writes the hints: one adapter for all rows, or one (or None) for each.

        Raises:
            ModelError: a single row does not fit in memory.
        """
        each = list(adapters) if isinstance(adapters, Sequence) else [adapters] * len(rows)
        sizes = [len(row) + (a.hint_length(len(row.query)) if a else 0) for row, a in zip(rows, each, strict=True)]
        results: list[RowLogProbs | None] = [None] * len(rows)
        # Longest first, so that what does not fit shows right away.
        waiting = sorted(range(len(rows)), key=lambda i: (sizes[i], -i))
        while waiting:
            count = min(len(waiting), max(1, self._budget // max(1, sizes[waiting[-1]])))
            chosen = waiting[-count:][::-1]
            try:
                values = self._forward([rows[i] for i in chosen], with_passage, [each[i] for i in chosen])
            except torch.OutOfMemoryError as error:
                if count == 1:
                    raise ModelError(f"{sizes[chosen[0]]} tokens do not fit in the memory of {self.device}") from error
                torch.cuda.empty_cache()
                self._budget = count * sizes[chosen[0]] // 2
                continue
            del waiting[-count:]
            for i, value in zip(chosen, values, strict=True):
                results[i] = value
        self._budget = min(self._batch_tokens, self._budget * 2)
        return [result for result in results if result is not None]

    def _forward(
        self, rows: Sequence[Row], with_passage: bool, adapters: Sequence[HintWriter | None]
    ) -> list[RowLogProbs]:
        raise NotImplementedError


class CausalLM(PretrainedLM):
    """Any decoder-only model of the transformers library, alone or with trained hints in its input.

    Args:
        model: an `AutoModelForCausalLM`.
        tokenizer: its tokenizer.
        name: how it is named in messages and provenance.
        max_length: tokens that a row may have.
        batch_tokens: padded tokens that a forward may have, encoded contexts included.
        folder: where the model was loaded from, if it was a folder.
        padding_side: where short rows are padded; the scores do not depend on it.
        store: keeps encoded contexts; without one, rows go through the model whole.

    Raises:
        ModelError: a store was given, but what the model remembers of a context is more than keys and values (Mamba).
    """

    has_encoder = False

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        name: str,
        max_length: int,
        batch_tokens: int,
        folder: Path | None = None,
        padding_side: PaddingSide = "left",
        store: ContextStore | None = None,
    ) -> None:
        super().__init__(model, tokenizer, name=name, max_length=max_length, batch_tokens=batch_tokens, folder=folder)
        self.padding_side = padding_side
        self.store = store
        self._buffer: Tensor | None = None
        kinds = getattr(model.config.get_text_config(), "layer_types", None) or ()
        if store is not None and (model._is_stateful or not set(kinds) <= {"full_attention", "sliding_attention"}):
            raise ModelError(f"{name}: the passage cache is for models whose layers are all attention")

    @property
    def embeddings(self) -> Any:
        """The input embedding layer, token ids → vectors `[…, d]`."""
        return self.model.get_input_embeddings()

    def score(
        self, rows: Sequence[Row], adapters: Sequence[HintWriter | None] | None = None, *, with_passage: bool = False
    ) -> tuple[Tensor, list[int]]:
        """Return the log-probabilities of the scored tokens of a batch, differentiable in what adapters wrote.

        Args:
            rows: token ids; all go into one forward pass.
            adapters: the adapter of each row, if any.
            with_passage: the passage's tokens are scored too; then rows go through the model whole.

        Returns:
            `[N]` float32, row by row, and how many each row has.

        Raises:
            OptionError: an adapter reads states of the passage, but its hint stands before the passage.
        """
        present = [adapter for adapter in adapters or () if adapter is not None]
        layer = _common_layer(present)
        after = all(row.hint is None or row.hint >= row.passage[1] for row in rows)
        whole = with_passage or not after or any(len(row.context) < 2 for row in rows)
        if layer is not None and whole:
            raise OptionError("an adapter that reads states of the passage needs its hint after the passage")
        encoded = None
        if not whole and (self.store is not None or layer is not None):
            encoded = [self.encode(row.context[: row.hint], layer) for row in rows]
        slots = self._write_hints(rows, adapters, encoded)
        hints = [0] * len(rows) if slots is None else slots.lengths
        starts = [0] * len(rows) if encoded is None else list(map(_start, rows, hints))
        layout = lay_out(
            rows,
            starts=starts,
            hints=hints,
            with_passage=with_passage,
            padding_side="right" if encoded is not None else self.padding_side,
        )
        inputs = self._inputs(layout, slots)
        logits = self.model(
            **inputs,
            **self._past(layout, encoded, starts),
            logits_to_keep=layout.predicting.to(self.device),
        ).logits
        values = token_log_probs(logits.reshape(-1, logits.shape[-1]), layout.labels.to(self.device))
        return values, layout.counts

    def encode(self, ids: tuple[int, ...], layer: int | None = None) -> Encoded:
        """Return keys and values of a context, from the store if there is one.

        Args:
            ids: the context's tokens.
            layer: also return the hidden states after so many layers.
        """
        if self.store is None:
            return self._encode(ids, layer)
        return self.store.get((ids, layer), lambda: self._encode(ids, layer))

    @torch.no_grad()
    def _encode(self, ids: tuple[int, ...], layer: int | None) -> Encoded:
        out = self.model(
            input_ids=torch.tensor([ids], device=self.device),
            position_ids=torch.arange(len(ids), device=self.device)[None],
            past_key_values=DynamicCache(),
            use_cache=True,
            output_hidden_states=layer is not None,
            logits_to_keep=1,
        )
        cache = torch.stack([torch.stack([kept.keys[0], kept.values[0]]) for kept in out.past_key_values.layers])
        return Encoded(cache, None if layer is None else out.hidden_states[layer][0].clone())

    def _forward(
        self, rows: Sequence[Row], with_passage: bool, adapters: Sequence[HintWriter | None]
    ) -> list[RowLogProbs]:
        values, counts = self.score(rows, adapters, with_passage=with_passage)
        out = []
        for row, value in zip(rows, torch.split(values.cpu(), counts), strict=True):
            border = len(value) - sum(row.scored)
            out.append(RowLogProbs(value[border:], value[:border] if with_passage else None))
        return out

    def _write_hints(
        self,
        rows: Sequence[Row],
        adapters: Sequence[HintWriter | None] | None,
        encoded: Sequence[Encoded] | None,
    ) -> Slots | None:
        """Let each adapter write for its rows; None where no row has one."""
        places: dict[int, list[int]] = {}
        for place, adapter in enumerate(adapters or ()):
            if adapter is not None:
                places.setdefault(id(adapter), []).append(place)
        parts = []
        for own in places.values():
            adapter = (adapters or ())[own[0]]
            assert adapter is not None
            states = None
            if adapter.reads_layer is not None:
                assert encoded is not None
                states = [encoded[i].states for i in own]
            parts.append((own, Slots.of(adapter(self.pairs([rows[i] for i in own], adapter, states)))))
        if len(parts) == 1 and len(parts[0][0]) == len(rows):
            return parts[0][1]
        return Slots.merge(parts, len(rows)) if parts else None

    def pairs(self, rows: Sequence[Row], adapter: HintWriter, states: Sequence[Tensor | None] | None) -> Pairs:
        """Return what an adapter reads of rows; `states` `[T, d]` are those of each whole encoded context."""
        bos = int(self.tokenizer.bos_token_id is not None)
        spans = [(bos, len(row.context[: row.hint])) if adapter.reads_template else row.passage for row in rows]
        passage, passage_mask = pad_ids([row.context[slice(*span)] for row, span in zip(rows, spans, strict=True)])
        query, query_mask = pad_ids([row.query for row in rows])
        stacked = None
        if states is not None:
            pieces = [s[slice(*span)] for s, span in zip(states, spans, strict=True) if s is not None]
            stacked = torch.nn.utils.rnn.pad_sequence(pieces, batch_first=True)
        device = self.device
        return Pairs(
            query.to(device), query_mask.bool().to(device), passage.to(device), passage_mask.bool().to(device), stacked
        )

    def _inputs(self, layout: Layout, slots: Slots | None) -> dict[str, Tensor]:
        ids = layout.ids.to(self.device)
        if slots is None:
            return {"input_ids": ids}
        embedded = self.embeddings(ids)
        where = layout.slots.to(self.device)
        return {"inputs_embeds": embedded.masked_scatter(where[..., None], slots.vectors.to(embedded.dtype))}

    def _past(self, layout: Layout, encoded: Sequence[Encoded] | None, starts: Sequence[int]) -> dict[str, Any]:
        """Return mask and positions, and the contexts' keys and values, left-padded so that they end together."""
        mask = layout.mask.long()
        if encoded is None:
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            return {
                "attention_mask": mask.to(self.device),
                "position_ids": positions.to(self.device),
                "use_cache": False,
            }
        past = max(starts)
        layers, _, heads, _, size = encoded[0].cache.shape
        width = layout.mask.shape[1]
        training = torch.is_grad_enabled()
        stacked = self._room(
            (layers, 2, len(encoded), heads, past + (0 if training else width), size), encoded[0].cache
        )
        before = torch.zeros(len(encoded), past, dtype=torch.long)
        for i, (each, length) in enumerate(zip(encoded, starts, strict=True)):
            stacked[:, :, i, :, past - length : past] = each.cache[..., :length, :]
            before[i, past - length :] = 1
        whole = torch.cat([before, mask], 1)
        cache = DynamicCache()
        cache.layers = [FilledLayer(layer[0], layer[1], past, grows=training) for layer in stacked]
        return {
            "attention_mask": whole.to(self.device),
            "position_ids": (whole.cumsum(1) - 1).clamp(min=0)[:, past:].to(self.device),
            "past_key_values": cache,
            "use_cache": True,
        }

    def _room(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Return finite numbers. Outside training, memory is reused: fresh pages cost as much as the work."""
        if torch.is_grad_enabled():
            return like.new_zeros(shape)
        count = math.prod(shape)
        if self._buffer is None or self._buffer.numel() < count or self._buffer.dtype != like.dtype:
            self._buffer = like.new_zeros(count)
        return self._buffer[:count].view(shape)


def _start(row: Row, hint: int) -> int:
    """Return how many context tokens stand in the cache: all before the hint, but something must predict the query."""
    before = len(row.context[: row.hint])
    return before if hint or before < len(row.context) else before - 1


def _common_layer(adapters: Sequence[HintWriter]) -> int | None:
    layers = {adapter.reads_layer for adapter in adapters} - {None}
    if len(layers) > 1:
        raise OptionError(f"adapters of one batch read states of different layers: {sorted(map(str, layers))}")
    return layers.pop() if layers else None


def pad_ids(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Right-pad with zeros: ids `[B, T]` and mask `[B, T]`."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return ids, mask


def token_log_probs(logits: Tensor, tokens: Tensor, chunk: int = 128) -> Tensor:
    """Return `log softmax(logits)[tokens]` in float32.

    Args:
        logits: `[N, V]`, any floating dtype.
        tokens: `[N]`.
        chunk: positions that are converted to float32 at a time.

    Returns:
        `[N]`.

    """
    parts = []
    for some, chosen in zip(torch.split(logits, chunk), torch.split(tokens, chunk), strict=True):
        exact = some.float()
        parts.append(exact.gather(1, chosen[:, None]).squeeze(1) - exact.logsumexp(1))
    return torch.cat(parts) if parts else logits.new_zeros(0, dtype=torch.float32)
