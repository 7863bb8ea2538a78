"""Frozen decoder-only language models that say how likely given tokens are.

Shapes: `B` rows, `T` positions, `N` scored positions of a batch, `K` scored positions of a row, `V` vocabulary.

Positions are explicit and padding is masked, so that a row's values do not depend on its company. The model's own head
runs at the scored positions only, which keeps the memory small and soft-capped or scaled heads right. Of rows without
scored tokens, what stands at the last one is read (`read_out.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qpeft.adapter import Adapter, Pairs
from qpeft.errors import ModelError, OptionError, PassageCacheError
from qpeft.lm.compiled import Compiled
from qpeft.lm.context_store import ContextStore, Encoded
from qpeft.lm.depth import Layers, find_layers
from qpeft.lm.encoding import AHEAD, ContextEncoder
from qpeft.lm.flops import decoder_flops
from qpeft.lm.hints import Slots, changing, common_layer, grouped, in_groups, written
from qpeft.lm.last_layer import KERNELS, LastLayer
from qpeft.lm.layout import Batch, Layout, PaddingSide, cached, few_sizes, lay_out
from qpeft.lm.past import Past
from qpeft.lm.per_layer import per_layer_inputs
from qpeft.lm.pretrained import RowLogProbs, T, pad_ids, token_log_probs
from qpeft.lm.read_out import Head, ReadOut
from qpeft.template import Row

MULTIPLE = 16
"""Whole rows are padded to such a width, since on CPUs a kernel is compiled for every shape that is new."""


class CausalLM(ContextEncoder):
    """Any decoder-only model of the transformers library, alone or with trained hints in its input.

    Args:
        model: an `AutoModelForCausalLM`.
        tokenizer: its tokenizer.
        name: how it is named in messages and provenance.
        max_length: tokens that a row may have.
        batch_tokens: padded tokens that a forward may have, encoded contexts included.
        folder: where the model was loaded from, if it was a folder.
        padding_side: where short rows are padded; the scores do not depend on it. On the right no mask is needed.
        store: keeps encoded contexts; without one, rows go through the model whole.
        head: a head on the last token that came with the model, if one did.
        has_words: whether the model predicts tokens; one that was saved as a classifier does not.
        compiled: the parts of its layers that were compiled.

    Raises:
        PassageCacheError: a store was given, but the model cannot go on from kept contexts; see `goes_on`.
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
        quantization: str = "none",
        padding_side: PaddingSide = "right",
        store: ContextStore | None = None,
        head: Head | None = None,
        has_words: bool = True,
        compiled: Compiled | None = None,
    ) -> None:
        size = {"max_length": max_length, "batch_tokens": batch_tokens}
        super().__init__(model, tokenizer, name=name, folder=folder, quantization=quantization, **size)
        self.head, self.has_words, self.compiled = head, has_words, compiled
        self.padding_side = padding_side
        self.store = store
        self._depth = model.config.get_text_config().num_hidden_layers
        self._layers: Layers | None = None
        self._last: LastLayer | None = None
        with suppress(ModelError):
            self._layers = find_layers(model)
            last = LastLayer(self._layers)
            self._last = last if self.attention_kernel not in KERNELS or last.works(model) else None
        self._contexts = Past(model)
        self._applied: Adapter | None = None
        if store is not None and not self.goes_on:
            why = "whose layers are all attention and take the positions that they are given"
            raise PassageCacheError(f"{name}: the passage cache is for models {why}")

    @property
    def goes_on(self) -> bool:
        """Whether the model can go on from contexts that were encoded before: not if it remembers more (Mamba)."""
        return self._contexts.goes_on

    @torch.no_grad()
    def width(self, layer: int) -> int:
        """Return the size of the states after so many layers; that of the last may be another (OPT-350m)."""
        ids = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        states = self.model.base_model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
        return int(states[layer].shape[-1])

    @property
    def embeddings(self) -> Any:
        """The input embedding layer, token ids → vectors `[…, d]`."""
        return self.model.get_input_embeddings()

    def score(
        self, rows: Sequence[Row], adapters: Sequence[Adapter | None] | None = None, *, with_passage: bool = False
    ) -> tuple[Tensor, list[int]]:
        """Return the log-probabilities of the scored tokens of a batch, differentiable in what adapters wrote.

        Args:
            rows: token ids; all go into one forward pass.
            adapters: the adapter of each row, if any.
            with_passage: the passage's tokens are scored too; then rows go through the model whole.

        Returns:
            `[N]` float32, row by row, and how many each row has.

        Raises:
            OptionError: an adapter reads states of the passage, but its hint stands before the passage; or one changes
                the model's layers, and not all rows are its own.
        """
        batch = self._batch(rows, adapters, with_passage)
        layout = batch.layout
        kept, real = layout.predicting, torch.ones(len(layout.labels), dtype=torch.bool)
        if self.device.type == "cpu":
            kept, real = few_sizes(kept)
        labels = layout.labels.new_zeros(len(real)).masked_scatter(real, layout.labels)
        with self._set_up(batch, layout.predicting.to(self.device)):
            logits = self.model(**batch.inputs, logits_to_keep=kept.to(self.device)).logits
        self._count_rows(batch, len(layout.labels))
        values = token_log_probs(logits.reshape(-1, logits.shape[-1]), labels.to(self.device))
        # by numbers made here: a device would be waited for to count what a mask chooses
        return values[torch.nonzero(real)[:, 0].to(self.device)], layout.counts

    def read_batch(
        self, rows: Sequence[Row], read_out: ReadOut, adapters: Sequence[Adapter | None] | None = None
    ) -> Tensor:
        """Return what is read at the last tokens of a batch, `[B, k]` float32, differentiable in adapters and head.

        Rows go through the model whole: they end in what differs from pair to pair.

        Args:
            rows: token ids without targets; all go into one forward pass.
            read_out: what is read. A head runs at these positions only.
            adapters: the adapter of each row, if any.

        Raises:
            OptionError: as `score`.
        """
        batch = self._batch(rows, adapters, False)
        last = batch.layout.predicting.to(self.device)
        with self._set_up(batch, last):
            if isinstance(read_out, Head):
                self._count_rows(batch, 0, 2 * len(rows) * read_out.weights)
                return read_out(self.model.base_model(**batch.inputs).last_hidden_state[last])
            self._count_rows(batch, len(rows))
            logits = self.model(**batch.inputs, logits_to_keep=last).logits
            return read_out(logits.reshape(-1, logits.shape[-1]))

    def _batch(self, rows: Sequence[Row], adapters: Sequence[Adapter | None] | None, with_passage: bool) -> Batch:
        """Let adapters write, and lay the rows out; see `score`."""
        changes = changing(adapters or ())
        layer = common_layer([adapter for adapter in adapters or () if adapter is not None])
        whole = with_passage or changes is not None or not all(map(_can_be_split, rows))
        if layer is not None and (changes is not None or not all(map(_hint_is_after, rows))):
            raise OptionError("an adapter that reads states of the passage needs its hint after the passage")
        encoded = None
        if layer is not None or (self.store is not None and not whole):
            encoded = self.encode_all([row.context[: row.hint] for row in rows], layer)
        slots = self._write_hints(rows, adapters, encoded)
        hints = [0] * len(rows) if slots is None else slots.lengths
        past = None if whole else encoded
        starts = [0] * len(rows) if past is None else list(map(cached, rows, hints))
        layout = lay_out(
            rows,
            starts=starts,
            hints=hints,
            with_passage=with_passage,
            padding_side="right" if past is not None else self.padding_side,
            multiple=MULTIPLE if past is None else 1,
        )
        sparing = past is None and not with_passage and self.spares_last_layer
        inputs = {**self._inputs(layout, slots), **self._past(layout, past, starts)}
        return Batch(layout, starts, inputs, changes, sparing)

    def _reads_contexts(self, rows: Sequence[Row], adapters: Sequence[Adapter | None]) -> bool:
        return self._contexts.apart and self._stores_contexts(rows, adapters)

    def _stores_contexts(self, rows: Sequence[Row], adapters: Sequence[Adapter | None]) -> bool:
        kept = all(adapter is None or not adapter.changes_lm for adapter in adapters)
        return self.store is not None and kept and all(map(_can_be_split, rows))

    def encode_rows_ahead(self, rows: Sequence[Row], adapters: Sequence[Adapter | None]) -> int:
        """Encode what a CPU's store lacks of the contexts of the first rows, as many as is sensible.

        Args:
            rows: token ids of what will be scored next.
            adapters: the adapter of each row, if any.

        Returns:
            How many rows that are.
        """
        if self.store is None or not self.keeps_contexts or not self._stores_contexts(rows, adapters):
            return len(rows)
        contexts = [row.context[: row.hint] for row in rows[:AHEAD]]
        layers = [*map(_layer, adapters[:AHEAD])]
        if not self.store.token_bytes:
            self.encode_ahead(self._batches_alike(list(dict.fromkeys(contexts)))[0], layers[0])
        count = self._ahead(list(map(len, contexts)))
        for own in grouped(layers[:count]):
            self.encode_ahead([contexts[i] for i in own], layers[own[0]])
        return count or len(rows)

    @contextmanager
    def _set_up(self, batch: Batch, wanted: Tensor) -> Iterator[None]:
        """Change the model where an adapter does so, and spare its last layer what is not `wanted` `[B, S]`."""
        with (
            nullcontext() if batch.changing is self._applied else self._changed_by(batch.changing),
            self._last.only_at(wanted) if self._last is not None and batch.sparing else nullcontext(),
        ):
            yield

    @contextmanager
    def _changed_by(self, adapter: Adapter | None) -> Iterator[None]:
        """Let an adapter change the model's layers, if there is one."""
        if adapter is None:
            yield
            return
        with adapter.applied(), nullcontext() if self.compiled is None else self.compiled.off():
            yield

    @property
    def spares_last_layer(self) -> bool:
        """Whether whole rows go through the last layer only where a token is predicted."""
        whole = self._layers is not None and len(self._layers.modules) == self._depth
        return whole and self._last is not None and self.attention_kernel in KERNELS

    def _count_rows(self, batch: Batch, predicted: int, more: int = 0) -> None:
        """Add a forward pass to what was computed: tokens that the head predicts, and more FLOPs behind the layers."""
        lengths = batch.layout.mask.sum(1).tolist()
        flops = None
        if self.shape is not None:
            rows = list(zip(lengths, batch.starts, strict=True))
            ends = batch.layout.counts if batch.sparing else None
            flops = decoder_flops(self.shape, rows, predicted, self._depth, ends) + more
        self._count(sum(lengths), batch.layout.mask.numel() - sum(lengths), flops)

    def check_depth(self, depth: int, adapters: Sequence[Adapter | None] = ()) -> None:
        """Raise the error that scoring with the first `depth` layers would end in; see `PretrainedLM.check_depth`."""
        if self._layers is None:
            raise OptionError(f"{self.name} cannot be cut to its first layers: which modules they are cannot be told")
        count = len(self._layers.modules)
        if not 1 <= depth < count:
            raise OptionError(f"layers={depth}: {self.name} has {count} layers; take from 1 to {count - 1} of them")
        for adapter in adapters:
            if adapter is not None and (adapter.reads_layer or 0) >= depth:
                # after the last layer that is run, its states would be those behind the model's last norm
                raise OptionError(f"layers={depth}: the adapter reads states of layer {adapter.reads_layer}; take more")

    @contextmanager
    def _first_layers(self, depth: int) -> Iterator[None]:
        assert self._layers is not None
        whole = self._depth
        with self._layers.first(depth):
            self._depth = depth
            try:
                yield
            finally:
                self._depth = whole

    def _in_batches(
        self,
        rows: Sequence[Row],
        each: Sequence[Adapter | None],
        scored: Sequence[int],
        forward: Callable[[list[Row], list[Adapter | None]], list[T]],
        mixed: bool = False,
    ) -> list[T]:
        """Change the model once for all batches of an adapter that changes it, since they may run side by side.

        What a CPU's store lacks of contexts is encoded before, many at once.
        """
        if mixed and self.keeps_contexts:
            found: list[T] = []
            while len(found) < len(rows):
                begin = len(found)
                end = begin + self.encode_rows_ahead(rows[begin:], each[begin:])
                found += super()._in_batches(rows[begin:end], each[begin:end], scored[begin:end], forward, mixed)
            return found

        def run(own: list[int]) -> list[T]:
            some = [rows[i] for i in own], [each[i] for i in own], [scored[i] for i in own]
            self._applied = changing(some[1])
            try:
                with self._changed_by(self._applied):
                    return super(CausalLM, self)._in_batches(*some, forward, mixed)
            finally:
                self._applied = None

        return in_groups((id(a) if a is not None and a.changes_lm else None for a in each), run)

    def _forward(
        self, rows: Sequence[Row], with_passage: bool, adapters: Sequence[Adapter | None]
    ) -> list[RowLogProbs]:
        def run(own: list[int]) -> Iterator[RowLogProbs]:
            values, counts = self.score([rows[i] for i in own], [adapters[i] for i in own], with_passage=with_passage)
            for i, value in zip(own, torch.split(values.cpu(), counts), strict=True):
                border = len(value) - sum(rows[i].scored)
                yield RowLogProbs(value[border:], value[:border] if with_passage else None)

        return in_groups(map(_layer, adapters), run)

    def _read(self, rows: Sequence[Row], read_out: ReadOut, adapters: Sequence[Adapter | None]) -> list[Tensor]:
        def run(own: list[int]) -> Tensor:
            return self.read_batch([rows[i] for i in own], read_out, [adapters[i] for i in own]).cpu()

        return in_groups(map(_layer, adapters), run)

    def _write_hints(
        self,
        rows: Sequence[Row],
        adapters: Sequence[Adapter | None] | None,
        encoded: Sequence[Encoded] | None,
    ) -> Slots | None:
        """Let each adapter write for its rows; None where no row has a hint."""
        each, parts = adapters or (), []
        for own in grouped(map(id, each)):
            adapter, states = each[own[0]], None
            if adapter is None:
                continue
            if adapter.reads_layer is not None:
                assert encoded is not None
                states = [encoded[i].states for i in own]
            some = [rows[i] for i in own]
            lengths = [len(row.query) for row in some]
            parts.append((own, written(adapter, self.pairs(some, adapter, states), lengths)))
        if not any(any(part.lengths) for _, part in parts):
            return None
        if len(parts) == 1 and len(parts[0][0]) == len(rows):
            return parts[0][1]
        return Slots.merge(parts, len(rows))

    def pairs(self, rows: Sequence[Row], adapter: Adapter, states: Sequence[Tensor | None] | None) -> Pairs:
        """Return what an adapter reads of rows; `states` `[T, d]` are those of each whole encoded context."""
        spans = [row.read(template=adapter.reads_template, states=states is not None) for row in rows]
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
        filled = slots.put_into(self.embeddings(ids), layout.slots.to(self.device))
        return {"inputs_embeds": filled, **per_layer_inputs(self.model, ids)}

    def _past(self, layout: Layout, encoded: Sequence[Encoded] | None, starts: Sequence[int]) -> dict[str, Any]:
        """Return mask and positions, and the contexts' keys and values."""
        mask = layout.mask.long()
        if encoded is None and self.padding_side == "right":  # what stands behind a row's tokens is not seen by them
            return {"position_ids": self._positions(mask.shape[1], int(mask.sum(1).max())), "use_cache": False}
        if encoded is None:
            positions = (mask.cumsum(1) - 1).clamp(min=0).to(self.device)
            return {"attention_mask": mask.to(self.device), "position_ids": positions, "use_cache": False}
        contexts = [each.cache[..., :length, :] for each, length in zip(encoded, starts, strict=True)]
        return self._contexts.inputs(contexts, mask)


def _layer(adapter: Adapter | None) -> int | None:
    """Return the layer whose states an adapter reads, if there is one and it reads any."""
    return None if adapter is None else adapter.reads_layer


def _hint_is_after(row: Row) -> bool:
    """Whether a row's hint, if it has one, stands behind the passage."""
    return row.hint is None or row.hint >= row.passage[1]


def _can_be_split(row: Row) -> bool:
    """Whether what stands before hint and query can be encoded by itself."""
    return _hint_is_after(row) and len(row.context) >= 2 and bool(row.target)
