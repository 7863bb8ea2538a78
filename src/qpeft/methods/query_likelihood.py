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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from qpeft.errors import OptionError
from qpeft.methods._pointwise import Pointwise
from qpeft.template import KeptTokens, Prompt, Row, Template, load_template
from qpeft.types import Passage, Query, Reranker, ScoringCounts

if TYPE_CHECKING:  # so that options can be listed without importing torch
    from qpeft.adapters._folder import AdapterFolder
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
    return Pointwise(build_scorer(config, lm), config.queries_per_batch)


def build_scorer(
    config: Config, lm: LanguageModel, opened: AdapterFolder | None = None, *, kept: KeptTokens | None = None
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
    if config.windows and config.window_overlap >= config.windows:
        raise OptionError(f"--window_overlap {config.window_overlap} must be below --windows {config.windows}")
    if config.document_prior and lm.has_encoder:
        raise OptionError("--document_prior needs a decoder-only model")
    for name, least in (("max_passage_tokens", 1), ("windows", 0), ("window_overlap", 0), ("queries_per_batch", 1)):
        value = getattr(config, name)
        if value is not None and value < least:
            raise OptionError(f"--{name} is {value}; it must be at least {least}")
    template = None if config.template is None else load_template(config.template)
    adapter = opened or config.adapter
    if adapter is None:
        prompt = _prompt(config, lm, template or load_template("plain"), None, kept)
        return QueryLikelihood(config, lm, prompt)
    from qpeft.adapters._folder import open_adapter

    opened = open_adapter(adapter, lm, template, config.template)
    if config.max_passage_tokens is None:
        config = dataclasses.replace(config, max_passage_tokens=opened.max_passage_tokens)
    prompt = _prompt(config, lm, opened.template, opened.adapter, kept)
    scorer = QueryLikelihood(config, lm, prompt, opened.adapter)
    scorer.facts["adapter"] = {"name": opened.name, "sha256": opened.sha256}
    return scorer


def _prompt(
    config: Config, lm: LanguageModel, template: Template, adapter: HintWriter | None, kept: KeptTokens | None
) -> Prompt:
    return Prompt(
        template,
        lm.tokenizer,
        lm.max_length,
        max_passage_tokens=config.max_passage_tokens,
        hint_length=None if adapter is None else adapter.hint_length,
        separate_target=lm.has_encoder,
        kept=kept,
    )


@dataclass(frozen=True, slots=True)
class Work:
    """The rows of some pairs; `owners` says of each row to which pair it belongs. A passage of zero tokens has none."""

    rows: list[Row]
    owners: list[int]
    pairs: int


class QueryLikelihood:
    """Scores (query, passage) pairs by the log-likelihood of the query.

    Args:
        config: options; those that the prompt and the adapter embody are not read.
        lm: the language model.
        prompt: template and tokenizer.
        adapter: what writes hints, if anything.
        hint_queries: what the adapter reads instead of a query, by query id (a control).
        depth: score with the model's first so many layers only.
    """

    def __init__(
        self,
        config: Config,
        lm: LanguageModel,
        prompt: Prompt,
        adapter: HintWriter | None = None,
        hint_queries: Mapping[str, Query] | None = None,
        depth: int | None = None,
    ) -> None:
        template = prompt.template
        self.counts = ScoringCounts()
        self.facts: dict[str, Any] = {
            "template": {"name": template.name, "version": template.version, "fingerprint": template.fingerprint}
        }
        self.adapter = adapter
        self.with_passage = bool(config.document_prior)
        self._config = config
        self.lm = lm
        self.prompt = prompt
        self._hint_queries = hint_queries or {}
        self._depth = depth

    def cheaper(self, *, passage_tokens: int | None = None, layers: int | None = None) -> QueryLikelihood:
        """Return a scorer that reads less of each passage, not in windows then, or with fewer of the model's layers.

        Raises:
            OptionError: the model or the adapter cannot do with so many layers.
        """
        config, prompt = self._config, self.prompt
        if passage_tokens is not None:
            config, prompt = dataclasses.replace(config, windows=0), prompt.cut(passage_tokens)
        if layers is not None:
            self.lm.check_depth(layers, [self.adapter])
        return QueryLikelihood(config, self.lm, prompt, self.adapter, self._hint_queries, layers)

    def check(self, query: Query) -> None:
        """Raise QueryError for a query that is empty or leaves no room for a passage."""
        self._rows(query, Passage("", ""))

    def score(self, pairs: Sequence[tuple[Query, Passage]]) -> list[float]:
        """Return the score of each pair, −∞ for a passage of zero tokens."""
        work = self.prepare(pairs)
        values = self.lm.log_probs(work.rows, with_passage=self.with_passage, adapters=self.adapter, depth=self._depth)
        return self.pool(work, values)

    def prepare(self, pairs: Sequence[tuple[Query, Passage]], max_passage_tokens: int | None = None) -> Work:
        """Return the rows that the model must read, and count what happened to the input.

        Args:
            pairs: queries and passages.
            max_passage_tokens: a bound on these passages, beside that of the options.

        Raises:
            QueryError: a query is empty or leaves no room for a passage.
        """
        work = Work([], [], len(pairs))
        self.prompt.read_ahead(passage for _, passage in pairs)
        for index, (query, passage) in enumerate(pairs):
            for row in self._rows(query, passage, max_passage_tokens):
                if row.passage[0] < row.passage[1]:
                    work.rows.append(row)
                    work.owners.append(index)
        self.counts.pairs += work.pairs
        self.counts.tokens += sum(len(row) for row in work.rows)
        self.counts.truncated_passages += sum(row.truncated for row in work.rows)
        self.counts.empty_passages += work.pairs - len(set(work.owners))
        return work

    def pool(self, work: Work, values: Sequence[RowLogProbs]) -> list[float]:
        """Return the score of each pair from what the model said of its rows."""
        pooled: list[list[float]] = [[] for _ in range(work.pairs)]
        for owner, value in zip(work.owners, values, strict=True):
            pooled[owner].append(self._row_score(value))
        return [self._pool(scores) for scores in pooled]

    def _rows(self, query: Query, passage: Passage, max_passage_tokens: int | None = None) -> list[Row]:
        read = self._hint_queries.get(query.id)
        if not self._config.windows:
            return self.prompt.rows(query, passage, hint_query=read, max_passage_tokens=max_passage_tokens)
        return self.prompt.rows(
            query,
            passage,
            window=self._config.windows,
            overlap=self._config.window_overlap,
            windows=True,
            hint_query=read,
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
