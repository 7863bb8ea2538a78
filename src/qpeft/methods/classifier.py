"""A classifier: one number from a trained head on the last token's state, as RankLLaMA.

    score(q, d) = w · h_last( query and passage in one text )        w `[d]`, no bias

Source: Ma et al. 2023, arXiv 2310.08319. It is what `AutoModelForSequenceClassification` with one label computes. The
head comes from an adapter that was trained with it (`qpeft train --method classifier --adapter lora`, or PEFT's folder
of the task SEQ_CLS, such as RankLLaMA's), or from a model that was saved as a classifier.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from qpeft.errors import OptionError
from qpeft.kept_tokens import KeptTokens
from qpeft.methods import _read_out
from qpeft.methods._read_out import ReadOutScorer
from qpeft.methods._rows import Options, open_prompt, query_batches
from qpeft.pointwise import Pointwise
from qpeft.types import Reranker

if TYPE_CHECKING:  # so that options can be listed without importing torch
    from torch import Tensor

    from qpeft.adapter import Adapter
    from qpeft.adapters._folder import AdapterFolder
    from qpeft.lm.pretrained import PretrainedLM
    from qpeft.lm.read_out import Head

TEMPLATE = "rankllama"
SCORES: Literal["log_odds"] = "log_odds"
HEAD = True
"""Training needs a head; said in the module, so that an adapter can be built accordingly."""


@dataclass(frozen=True)
class Config(Options):
    """Options of the classifier."""


def build(config: Config, lm: PretrainedLM) -> Reranker:
    """Return a reranker that scores with `lm`.

    Raises:
        OptionError: options that contradict each other, or no head.
    """
    scorer = build_scorer(config, lm)
    scorer.kind  # noqa: B018 — a missing head shows before the work
    return Pointwise(scorer, query_batches(config, lm))


def build_scorer(
    config: Config, lm: PretrainedLM, opened: AdapterFolder | None = None, *, kept: KeptTokens | None = None
) -> ReadOutScorer:
    """Return the scorer alone; see `query_likelihood.build_scorer`.

    Raises:
        OptionError: options that contradict each other.
    """
    prompt, opened, facts = open_prompt("classifier", config, lm, opened, kept, template=TEMPLATE)
    _read_out.check_template(prompt)
    scorer = ReadOutScorer(config, lm, prompt, HeadReading(lm), None if opened is None else opened.adapter)
    scorer.facts |= facts
    return scorer


@dataclass(frozen=True)
class HeadReading:
    """The head of the adapter, else of the model."""

    lm: PretrainedLM

    def read_out(self, adapter: Adapter | None) -> Head:
        """Return the head.

        Raises:
            OptionError: neither has one.
        """
        found = self.lm.head if adapter is None or adapter.head is None else adapter.head
        if found is None:
            raise OptionError(
                "--method classifier needs a trained head: an --adapter trained with this method, or a --model that "
                "was saved as a classifier"
            )
        return found

    def scores(self, values: Tensor) -> Tensor:
        """Return `[B]` of `[B, 1]`."""
        return values[:, 0]

    def answered(self, values: Tensor) -> None:
        """Return None: a head gives no answers."""
