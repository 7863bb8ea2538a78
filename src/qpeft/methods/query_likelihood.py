"""Query likelihood: a passage is as good as the query is likely after it.

    score(q, d) = 1/|q| · Σ_t log P( q_t | q_<t, d )        nats per scored token; or the sum

Zero-shot this is UPR (Sachan et al. 2022, arXiv 2204.07496; for decoders Zhuang et al. 2023, arXiv 2310.13243).

Two options for what plain likelihood does badly:

* `windows`: a long passage is read in overlapping windows; the best window's score (or the windows' mean) counts.
* `document_prior` λ adds λ · 1/|d| · Σ_t log P( d_t | d_<t ), the passage's own mean log-likelihood under the template.
  It follows the idea of UR3 (Yuan et al. 2024, arXiv 2406.13331) that the probability of generating the document
  corrects a bias of query likelihood. It costs no further forward pass. λ must be chosen on dev data.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from qpeft.errors import OptionError
from qpeft.kept_tokens import KeptTokens
from qpeft.methods._rows import Options, RowScorer, Work, open_prompt, query_batches
from qpeft.pointwise import Pointwise
from qpeft.template import Row
from qpeft.types import Query, Reranker

if TYPE_CHECKING:  # so that options can be listed without importing torch
    from torch import Tensor

    from qpeft.adapter import Adapter
    from qpeft.adapters._folder import AdapterFolder
    from qpeft.lm.pretrained import PretrainedLM, RowLogProbs


TEMPLATE = "plain"
SCORES: Literal["log_likelihood"] = "log_likelihood"


@dataclass(frozen=True)
class Config(Options):
    """Options of query likelihood."""

    normalize: Literal["mean", "sum"] = "mean"
    """Mean or sum of the log-probabilities of the scored tokens."""
    document_prior: float = 0.0
    """Weight of the passage's own mean log-likelihood."""


def build(config: Config, lm: PretrainedLM) -> Reranker:
    """Return a reranker that scores with `lm`.

    Raises:
        OptionError: options that contradict each other.
    """
    return Pointwise(build_scorer(config, lm), query_batches(config, lm))


def build_scorer(
    config: Config, lm: PretrainedLM, opened: AdapterFolder | None = None, *, kept: KeptTokens | None = None
) -> QueryLikelihood:
    """Return the scorer alone.

    Args:
        config: options.
        lm: the language model.
        opened: an adapter that is open already, in place of `config.adapter`.
        kept: see `Prompt`.

    Raises:
        OptionError: options that contradict each other.
    """
    if config.document_prior and lm.has_encoder:
        raise OptionError("--document-prior needs a decoder-only model")
    prompt, opened, facts = open_prompt("query_likelihood", config, lm, opened, kept, template=TEMPLATE)
    if not prompt.template.target:
        raise OptionError(f"--template {prompt.template.name}: it has no target, whose likelihood could be the score")
    scorer = QueryLikelihood(config, lm, prompt, None if opened is None else opened.adapter)
    scorer.facts |= facts
    return scorer


class QueryLikelihood(RowScorer):
    """Scores (query, passage) pairs by the log-likelihood of the query; see `RowScorer`."""

    _config: Config
    _depth: int | None = None
    """Layers that are run; all, if None."""

    @property
    def kind(self) -> Hashable:
        """Scorers of one kind and one model may have their rows read together."""
        return "query_likelihood", self._with_passage, self._depth

    @property
    def ready(self) -> bool:
        """Whether it can score: always."""
        return True

    def cheaper(self, *, passage_tokens: int | None = None, layers: int | None = None) -> QueryLikelihood:
        """Return a scorer that reads less of each passage, not in windows then, or with fewer of the model's layers.

        Raises:
            OptionError: the model or the adapter cannot do with so many layers.
        """
        other = self.using(self.adapter)
        if passage_tokens is not None:
            other._config, other.prompt = dataclasses.replace(self._config, windows=0), self.prompt.cut(passage_tokens)
        if layers is not None:
            self.lm.check_depth(layers, [self.adapter])
            other._depth = layers
        return other

    def with_hint_queries(self, queries: Mapping[str, Query]) -> QueryLikelihood:
        """Return the same scorer, whose adapter reads other queries, by query id, in place of these (a control)."""
        other = self.using(self.adapter)
        other._hint_queries = queries
        return other

    def values(self, rows: Sequence[Row], adapters: Sequence[Adapter | None]) -> list[RowLogProbs]:
        """Return the log-probabilities of each row's scored tokens."""
        return self.lm.log_probs(rows, with_passage=self._with_passage, adapters=adapters, depth=self._depth)

    def batch_learned(self, rows: Sequence[Row]) -> tuple[Tensor, None]:
        """Return the mean log-likelihood of each row in nats per scored token, `[N]`; for decoder-only models."""
        import torch

        lm: Any = self.lm
        values, counts = lm.score(rows, None if self.adapter is None else [self.adapter] * len(rows))
        lengths = torch.tensor(counts, device=values.device)
        owners = torch.repeat_interleave(torch.arange(len(counts), device=values.device), lengths)
        return values.new_zeros(len(counts)).index_add(0, owners, values) / lengths, None

    def probability(self, score: float) -> float:
        """Return the geometric mean of the query tokens' probabilities."""
        return min(1.0, math.exp(score))

    def pool(self, work: Work, values: Sequence[RowLogProbs]) -> list[float]:
        """Return the score of each pair from what the model said of its rows."""
        return work.pool([self._row_score(value) for value in values], self._config.window_pool)

    @property
    def _with_passage(self) -> bool:
        return bool(self._config.document_prior)

    def _row_score(self, value: RowLogProbs) -> float:
        target = value.target.double()
        score = float(target.mean() if self._config.normalize == "mean" else target.sum())
        if value.passage is not None and len(value.passage):
            score += self._config.document_prior * float(value.passage.double().mean())
        return score
