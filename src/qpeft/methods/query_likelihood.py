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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from qpeft.errors import OptionError
from qpeft.methods._pointwise import Pointwise
from qpeft.template import Prompt, Row, Template, load_template
from qpeft.types import Passage, Query, Reranker, ScoringCounts

if TYPE_CHECKING:  # so that options can be listed without importing torch
    from qpeft.hints import HintWriter
    from qpeft.pretrained import LanguageModel, RowLogProbs


@dataclass(frozen=True)
class Config:
    """Options of query likelihood."""

    template: str | None = None
    """Name of a template (plain, upr, qpeft …) or path of a YAML file; by default the adapter's, else plain."""
    adapter: str | None = None
    """Folder of a trained adapter."""
    normalize: Literal["mean", "sum"] = "mean"
    """Mean or sum of the log-probabilities of the scored tokens."""
    max_passage_tokens: int | None = None
    """Cut passages to this many tokens; by default only what the model's context demands."""
    windows: int = 0
    """Read passages in windows of this many tokens instead of cutting them; 0: do not."""
    window_overlap: int = 32
    """Tokens that consecutive windows share."""
    window_pool: Literal["max", "mean"] = "max"
    """How the scores of a passage's windows become one."""
    document_prior: float = 0.0
    """Weight of the passage's own mean log-likelihood."""
    queries_per_batch: int = 1
    """Queries whose candidates are batched together; more fills a large GPU better."""


def build(config: Config, lm: LanguageModel) -> Reranker:
    """Return a reranker that scores with `lm`.

    Raises:
        OptionError: options that contradict each other.
    """
    if config.windows and config.window_overlap >= config.windows:
        raise OptionError(f"--window_overlap {config.window_overlap} must be below --windows {config.windows}")
    if config.document_prior and lm.has_encoder:
        raise OptionError("--document_prior needs a decoder-only model")
    for name, least in (("max_passage_tokens", 1), ("windows", 0), ("window_overlap", 0), ("queries_per_batch", 1)):
        value = getattr(config, name)
        if value is not None and value < least:
            raise OptionError(f"--{name} is {value}; it must be at least {least}")
    template = load_template(config.template or "plain")
    if config.adapter is None:
        return Pointwise(QueryLikelihood(config, lm, template), config.queries_per_batch)
    if lm.has_encoder:
        raise OptionError("--adapter needs a decoder-only model")
    from qpeft.adapters._folder import load_adapter

    opened = load_adapter(config.adapter, lm)  # type: ignore[arg-type]
    if config.template is not None and template.fingerprint != opened.template.fingerprint:
        raise OptionError(
            f"--template {config.template}: adapter {config.adapter!r} was trained with {opened.template.name!r}"
        )
    if config.max_passage_tokens is None:
        config = dataclasses.replace(config, max_passage_tokens=opened.max_passage_tokens)
    scorer = QueryLikelihood(config, lm, opened.template, opened.adapter)
    scorer.facts["adapter"] = {"name": opened.name, "sha256": opened.sha256}
    return Pointwise(scorer, config.queries_per_batch)


class QueryLikelihood:
    """Scores (query, passage) pairs by the log-likelihood of the query."""

    def __init__(
        self, config: Config, lm: LanguageModel, template: Template, adapter: HintWriter | None = None
    ) -> None:
        self.counts = ScoringCounts()
        self.facts: dict[str, Any] = {
            "template": {"name": template.name, "version": template.version, "fingerprint": template.fingerprint}
        }
        self.template = template
        self._config = config
        self._lm = lm
        self._adapter = adapter
        self._prompt = Prompt(
            template,
            lm.tokenizer,
            lm.max_length,
            max_passage_tokens=config.max_passage_tokens,
            hint_length=None if adapter is None else adapter.hint_length,
            separate_target=lm.has_encoder,
        )

    def check(self, query: Query) -> None:
        """Raise QueryError for a query that is empty or leaves no room for a passage."""
        self._rows(query, Passage("", ""))

    def score(self, pairs: Sequence[tuple[Query, Passage]]) -> list[float]:
        """Return the score of each pair, −∞ for a passage of zero tokens."""
        rows: list[Row] = []
        owners: list[int] = []
        for index, (query, passage) in enumerate(pairs):
            for row in self._rows(query, passage):
                if row.passage[0] < row.passage[1]:
                    rows.append(row)
                    owners.append(index)
        self._count(pairs, rows, owners)
        pooled: list[list[float]] = [[] for _ in pairs]
        values = self._lm.log_probs(rows, with_passage=bool(self._config.document_prior), adapters=self._adapter)
        for owner, value in zip(owners, values, strict=True):
            pooled[owner].append(self._row_score(value))
        return [self._pool(scores) for scores in pooled]

    def _rows(self, query: Query, passage: Passage) -> list[Row]:
        if not self._config.windows:
            return self._prompt.rows(query, passage)
        return self._prompt.rows(
            query, passage, window=self._config.windows, overlap=self._config.window_overlap, windows=True
        )

    def _row_score(self, value: RowLogProbs) -> float:
        target = value.target.double()
        score = float(target.mean() if self._config.normalize == "mean" else target.sum())
        if value.passage is not None and len(value.passage):
            score += self._config.document_prior * float(value.passage.double().mean())
        return score

    def _pool(self, scores: list[float]) -> float:
        if not scores:
            return -math.inf
        if not all(map(math.isfinite, scores)):
            return math.nan  # no window may hide it, and −∞ means a passage of zero tokens
        return max(scores) if self._config.window_pool == "max" else sum(scores) / len(scores)

    def _count(self, pairs: Sequence[tuple[Query, Passage]], rows: list[Row], owners: list[int]) -> None:
        self.counts.pairs += len(pairs)
        self.counts.tokens += sum(len(row) for row in rows)
        self.counts.truncated_passages += sum(row.truncated for row in rows)
        self.counts.empty_passages += len(pairs) - len(set(owners))
