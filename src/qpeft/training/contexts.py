"""Contexts of a training: whether they fit in memory, to be encoded once and kept, and their encoding ahead of steps.

A store that holds only some of them would be of little use: by the time that one is read again, in the next epoch,
others have taken its place. Then it is quicker to encode those of a step together, and to keep none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from qpeft.lm.causal import CausalLM
from qpeft.lm.encoding import AHEAD
from qpeft.template import Prompt, Row
from qpeft.training.config import TrainingConfig
from qpeft.training.processes import processes
from qpeft.types import Candidates, Group

if TYPE_CHECKING:
    from qpeft.adapter import Adapter
    from qpeft.training.trainer import Collator, TrainingSet

SAMPLE = 200
"""Contexts whose lengths are taken for those of all."""


def contexts_bytes(
    lm: CausalLM, prompt: Prompt, groups: Sequence[Group], config: TrainingConfig, dev: Sequence[Candidates]
) -> int:
    """Return about how many bytes the encoded contexts of all epochs take, those of dev among them; 0 if none are.

    Args:
        lm: the frozen model; it encodes one context.
        prompt: template and tokenizer.
        groups: training queries with their passages.
        config: how many negatives are drawn, and how often.
        dev: what is ranked at evaluations.
    """
    pairs = [(group.query, passage) for group in groups for passage in (*group.positives, *group.negatives)]
    known = {passage.id for _, passage in pairs}
    drawn = sum(1 + min(len(group.negatives), config.negatives * config.epochs) for group in groups)
    ranked = {passage.id for item in dev for passage in item.passages} - known
    every = max(1, len(pairs) // SAMPLE)
    rows = [prompt.rows(query, passage)[0] for query, passage in pairs[::every]]
    lengths = [len(row.context[: row.hint]) for row in rows]
    if not all(lengths):
        return 0  # hints stand before everything, and nothing is encoded by itself
    cache = lm.encode(rows[0].context[: rows[0].hint]).cache
    return int((min(drawn, len(known)) + len(ranked)) * sum(lengths) / len(lengths) * cache.nbytes / cache.shape[3])


class EncodeAhead(TrainerCallback):
    """Has the contexts of the next steps encoded together, which takes less time than those of each step alone.

    Args:
        lm: the frozen model, with what it keeps.
        adapter: what is trained.
        data: the groups of all epochs.
        collator: makes rows of them.
        config: queries of a forward pass and of a step.
    """

    def __init__(
        self, lm: CausalLM, adapter: Adapter, data: TrainingSet, collator: Collator, config: TrainingConfig
    ) -> None:
        self._lm, self._adapter, self._data, self._collator = lm, adapter, data, collator
        self._queries, self._accumulation = config.batch_queries, config.gradient_accumulation
        self._processes = processes()
        self._done = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Encode, unless that was done a few steps ago."""
        batch = state.global_step * self._accumulation
        if batch < self._done:
            return
        rows: list[Row] = []
        while (place := self._place(batch)) < len(self._data) and len(rows) < AHEAD:
            end = min(place + self._queries, len(self._data))
            rows += self._collator([self._data[i] for i in range(place, end)])["batch"].rows
            batch += 1
        if rows and self._lm.encode_rows_ahead(rows, [self._adapter] * len(rows)) == len(rows):
            self._done = batch

    def _place(self, batch: int) -> int:
        """Return where in the data a batch of this process begins: processes take batches in turn."""
        return (batch * self._processes.count + self._processes.rank) * self._queries
