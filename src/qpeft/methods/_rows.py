"""From pairs to rows, which any method's model reads in one batch with those of others."""

from __future__ import annotations

import abc
import copy
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

from qpeft.errors import OptionError, at_least
from qpeft.kept_tokens import KeptTokens
from qpeft.options import Checked
from qpeft.template import Prompt, Row, load_template
from qpeft.types import Passage, Query, QueryBatches, ScoringCounts

if TYPE_CHECKING:  # so that options can be listed without importing torch
    from torch import Tensor

    from qpeft.adapter import Adapter
    from qpeft.adapters._folder import AdapterFolder
    from qpeft.lm.pretrained import PretrainedLM

ON_GPU = 2_048
"""Pairs that are scored together on a GPU: some tens of its batches."""


@dataclass(frozen=True)
class Options(Checked):
    """Options that all methods with rows have."""

    template: str | None = None
    """Name of a template (plain, upr, qpeft …) or path of a YAML file; by default the adapter's, else the method's."""
    adapter: str | None = None
    """Folder of a trained adapter, or the name of an embedded one."""
    max_passage_tokens: int | None = None
    """Cut passages to this many tokens; by default as the adapter was trained, or what the model's context demands."""
    windows: int = 0
    """Read passages in windows of this many tokens instead of cutting them; 0: do not."""
    window_overlap: int = 32
    """Tokens that consecutive windows share."""
    window_pool: Literal["max", "mean"] = "max"
    """How the scores of a passage's windows become one."""
    queries_per_batch: int | None = None
    """Queries whose candidates are batched together; by default as many as fill batches of like length."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.windows and self.max_passage_tokens is not None:
            raise OptionError("--max-passage-tokens cuts passages, and --windows reads them whole: give one of the two")
        if self.windows and self.window_overlap >= self.windows:
            raise OptionError(f"--window-overlap {self.window_overlap} must be below --windows {self.windows}")
        at_least(1, max_passage_tokens=self.max_passage_tokens, queries_per_batch=self.queries_per_batch)
        at_least(0, windows=self.windows, window_overlap=self.window_overlap)
        if self.template is not None:
            load_template(self.template)  # a wrong name shows before a model is opened


class RowScorer(abc.ABC):
    """A scorer whose scores come of rows: what training and the server need of a method.

    Args:
        config: options; those that the prompt and the adapter embody are not read.
        lm: the language model.
        prompt: template and tokenizer.
        adapter: what changes the model or writes hints, if anything.
    """

    def __init__(self, config: Options, lm: PretrainedLM, prompt: Prompt, adapter: Adapter | None = None) -> None:
        self.counts = ScoringCounts()
        self.facts: dict[str, Any] = {}
        self.lm, self.prompt, self.adapter = lm, prompt, adapter
        self._config = config
        self._hint_queries: Mapping[str, Query] = {}

    @property
    @abc.abstractmethod
    def kind(self) -> Hashable:
        """Scorers of one kind and one model may have their rows read together."""

    @property
    @abc.abstractmethod
    def ready(self) -> bool:
        """Whether it can score; a classifier cannot without a head."""

    @abc.abstractmethod
    def values(self, rows: Sequence[Row], adapters: Sequence[Adapter | None]) -> list[Any]:
        """Return what the model says of each row, whichever scorer of this kind it belongs to."""

    @abc.abstractmethod
    def pool(self, work: Work, values: Sequence[Any]) -> list[float]:
        """Return the score of each pair from what the model said of its rows."""

    @abc.abstractmethod
    def batch_learned(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor | None]:
        """Return the scores of rows in one forward pass, `[N]` float32, differentiable in adapter and head.

        And what else a loss may learn from, if there is anything; see `losses.sft`.
        """

    @abc.abstractmethod
    def probability(self, score: float) -> float:
        """Return what stands for the probability of relevance where no calibration does."""

    def using(self, adapter: Adapter | None) -> Self:
        """Return the same scorer with another adapter, or with none; counts and facts are its own, and begin empty."""
        other = copy.copy(self)
        other.adapter, other.counts, other.facts = adapter, ScoringCounts(), {}
        return other

    def rows(self, query: Query, passage: Passage, max_passage_tokens: int | None = None) -> list[Row]:
        """Return the rows of a pair: one, or one per window."""
        return self.prompt.rows(
            query,
            passage,
            windows=self._config.windows,
            overlap=self._config.window_overlap,
            hint_query=self._hint_queries.get(query.id),
            max_passage_tokens=max_passage_tokens,
        )

    def check(self, query: Query) -> None:
        """Raise QueryError for a query that is empty or leaves no room for a passage."""
        self.rows(query, Passage("", ""))

    def score(self, pairs: Sequence[tuple[Query, Passage]]) -> list[float]:
        """Return the score of each pair, −∞ for a passage of zero tokens."""
        work = self.prepare(pairs)
        return self.pool(work, self.values(work.rows, [self.adapter] * len(work.rows)))

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
            for row in self.rows(query, passage, max_passage_tokens):
                if row.passage[0] < row.passage[1]:
                    work.rows.append(row)
                    work.owners.append(index)
        self.counts.pairs += work.pairs
        self.counts.tokens += sum(len(row) for row in work.rows)
        self.counts.truncated_passages += sum(row.truncated for row in work.rows)
        self.counts.empty_passages += work.pairs - len(set(work.owners))
        return work


@dataclass(frozen=True, slots=True)
class Work:
    """The rows of some pairs; `owners` says of each row to which pair it belongs. A passage of zero tokens has none."""

    rows: list[Row]
    owners: list[int]
    pairs: int

    def pool(self, scores: Sequence[float], how: str) -> list[float]:
        """Return the score of each pair from those of its rows (windows): `max` or `mean`; −∞ where there is none."""
        pooled: list[list[float]] = [[] for _ in range(self.pairs)]
        for owner, score in zip(self.owners, scores, strict=True):
            pooled[owner].append(score)
        return [_pool(some, how) for some in pooled]


def _pool(scores: list[float], how: str) -> float:
    if not scores:
        return -math.inf
    if not all(map(math.isfinite, scores)):
        return math.nan  # no window may hide it, and −∞ means a passage of zero tokens
    return max(scores) if how == "max" else sum(scores) / len(scores)


def open_prompt(
    method: str,
    config: Options,
    lm: PretrainedLM,
    opened: AdapterFolder | None,
    kept: KeptTokens | None,
    *,
    template: str,
) -> tuple[Prompt, AdapterFolder | None, dict[str, Any]]:
    """Open what a method's options name.

    Args:
        method: its name.
        config: its options.
        lm: the language model.
        opened: an adapter that is open already, in place of `config.adapter`.
        kept: see `Prompt`.
        template: the one that is taken without an adapter and without an option.

    Returns:
        The prompt, the adapter, and what provenance says of them.

    Raises:
        OptionError: wider windows than the adapter's passages.
        AdapterError: the adapter cannot be used with the model.
    """
    wanted = None if config.template is None else load_template(config.template)
    adapter: AdapterFolder | str | None = opened or config.adapter
    bound = config.max_passage_tokens
    if adapter is not None:
        from qpeft.adapters._folder import open_adapter

        opened = open_adapter(adapter, lm, wanted, config.template, method=method)
        wanted = opened.template
        known = opened.max_passage_tokens
        if known is not None and config.windows > known:
            raise OptionError(f"--windows is {config.windows}; the adapter knows passages of at most {known} tokens")
        bound = known if bound is None else bound
    chosen = wanted or load_template(template)
    prompt = Prompt(
        chosen,
        lm.tokenizer,
        lm.max_length,
        max_passage_tokens=bound,
        hint_length=None if opened is None else opened.adapter.hint_length,
        separate_target=lm.has_encoder,
        kept=kept,
    )
    facts: dict[str, Any] = {
        "template": {"name": chosen.name, "version": chosen.version, "fingerprint": chosen.fingerprint}
    }
    if opened is not None:
        facts["adapter"] = {"name": opened.name, "sha256": opened.sha256}
    return prompt, opened, facts


def query_batches(config: Options, lm: PretrainedLM) -> QueryBatches:
    """Return which queries are worked on together: on a GPU many, so that large batches need little padding."""
    queries = config.queries_per_batch
    return QueryBatches(queries) if lm.device.type == "cpu" else QueryBatches(queries, ON_GPU)
