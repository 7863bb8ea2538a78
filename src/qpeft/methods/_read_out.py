"""A scorer whose scores are read at the last token of each row; what is read is the method's."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from qpeft.errors import OptionError
from qpeft.methods._rows import Options, RowScorer, Work
from qpeft.template import Prompt, Row

if TYPE_CHECKING:  # so that options can be listed without importing torch
    from torch import Tensor

    from qpeft.adapter import Adapter
    from qpeft.lm.pretrained import PretrainedLM
    from qpeft.lm.read_out import ReadOut


def check_template(prompt: Prompt) -> None:
    """Raise OptionError for a template with a target: its last token is a query's."""
    if prompt.template.target:
        raise OptionError(
            f"--template {prompt.template.name}: the query is its target; one with {{query}} in its context is needed, "
            "such as rankllama or yes_no"
        )


class Reading(Protocol):
    """What a method reads, and how it becomes a score."""

    def read_out(self, adapter: Adapter | None) -> ReadOut:
        """Return what is read with an adapter, or with the model alone."""
        ...

    def scores(self, values: Tensor) -> Tensor:
        """Return the scores `[B]` of what was read, `[B, k]`."""
        ...

    def answered(self, values: Tensor) -> Tensor | None:
        """Return the log-probability `[B]` that any answer is given at all; None where there are no answers."""
        ...


class ReadOutScorer(RowScorer):
    """Scores (query, passage) pairs by what stands at the last token.

    Args:
        config: options; those that the prompt and the adapter embody are not read.
        lm: the language model.
        prompt: template and tokenizer.
        reading: what is read.
        adapter: what changes the model or writes hints, if anything.
    """

    def __init__(
        self, config: Options, lm: PretrainedLM, prompt: Prompt, reading: Reading, adapter: Adapter | None = None
    ) -> None:
        super().__init__(config, lm, prompt, adapter)
        self._reading = reading

    @property
    def kind(self) -> Hashable:
        """Scorers of one kind and one model may have their rows read together."""
        return self._reading.read_out(self.adapter)

    @property
    def ready(self) -> bool:
        """Whether it can score: whether there is what is to be read."""
        try:
            self._reading.read_out(self.adapter)
        except OptionError:
            return False
        return True

    def values(self, rows: Sequence[Row], adapters: Sequence[Adapter | None]) -> list[Tensor]:
        """Return what is read of each row, `[k]`."""
        return self.lm.read(rows, self._reading.read_out(self.adapter), adapters=adapters)

    def pool(self, work: Work, values: Sequence[Tensor]) -> list[float]:
        """Return the score of each pair from what was read of its rows."""
        scores = [float(self._reading.scores(value[None].double())) for value in values]
        return work.pool(scores, self._config.window_pool)

    def batch_learned(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor | None]:
        """Return the scores of rows in one forward pass, `[N]`, differentiable; for decoder-only models.

        And the log-probability `[N]` that any answer is given, if there are answers.
        """
        lm: Any = self.lm
        adapters = None if self.adapter is None else [self.adapter] * len(rows)
        values = lm.read_batch(rows, self._reading.read_out(self.adapter), adapters)
        return self._reading.scores(values), self._reading.answered(values)

    def probability(self, score: float) -> float:
        """Return the logistic function of the score."""
        return 1.0 / (1.0 + math.exp(-score)) if score >= 0 else math.exp(score) / (1.0 + math.exp(score))
