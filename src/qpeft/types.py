"""The records that flow through qpeft, and the two contracts of whatever ranks them.

Score: higher is better, everywhere. Nothing here imports torch.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from itertools import groupby
from operator import index, itemgetter
from typing import Any, ClassVar, NotRequired, Protocol, SupportsIndex, TypedDict, TypeVar, final, overload

import numpy as np

from qpeft.errors import OptionError, ScoreError

T = TypeVar("T")
UNREADABLE = -1e6
"""Score of a passage without a token where scores of several lists may be compared: below whatever a model says."""


def whole(text: str) -> str:
    """Join surrogate pairs and replace lone surrogates, which no tokenizer and no file takes, by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _check_texts(what: str, name: Any, **texts: Any) -> None:
    if not isinstance(name, str):
        raise OptionError(f"{what} {name!r}: its id is no text, but {type(name).__name__}")
    for part, text in texts.items():
        if not isinstance(text, str):
            raise OptionError(f"{what} {name!r}: its {part} is {text!r:.60}, not a text")


@dataclass(frozen=True, slots=True)
class Query:
    """A question or keyword query; `answers` are the accepted answer strings, where a collection has them."""

    id: str
    text: str
    answers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_texts("query", self.id, text=self.text)
        if isinstance(self.answers, str):
            raise OptionError(f"query {self.id!r}: answers are one text, {self.answers!r:.60}, not several")
        object.__setattr__(self, "text", whole(self.text))
        object.__setattr__(self, "answers", tuple(map(whole, self.answers)))


@dataclass(frozen=True, slots=True)
class Passage:
    """A unit of text that can be ranked."""

    id: str
    text: str
    title: str = ""

    def __post_init__(self) -> None:
        _check_texts("passage", self.id, text=self.text, title=self.title)
        object.__setattr__(self, "text", whole(self.text))
        object.__setattr__(self, "title", whole(self.title))

    @property
    def blank(self) -> bool:
        """Whether it has no text that a model could read."""
        return not f"{self.title}{self.text}".strip()


@dataclass(frozen=True, slots=True)
class Candidates:
    """A query with the passages to rank, in first-stage order; `scores` are the first stage's, or empty."""

    query: Query
    passages: tuple[Passage, ...]
    scores: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "passages", tuple(self.passages))
        object.__setattr__(self, "scores", tuple(self.scores))
        ids = set()
        for passage in self.passages:
            if not isinstance(passage, Passage):
                raise OptionError(f"query {self.query.id!r}: a candidate is {passage!r:.60}, not a Passage")
            if passage.id in ids:
                raise ScoreError(f"query {self.query.id!r}: passage {passage.id!r} occurs twice")
            ids.add(passage.id)
        if self.scores and len(self.scores) != len(self.passages):
            raise ScoreError(
                f"query {self.query.id!r}: {len(self.passages)} passages but {len(self.scores)} first-stage scores"
            )


@dataclass(frozen=True, slots=True)
class Group:
    """One training unit: a query, passages that answer it, and passages that do not."""

    query: Query
    positives: tuple[Passage, ...]
    negatives: tuple[Passage, ...] = ()
    also_relevant: tuple[Passage, ...] = ()
    """Positives that the same query has in other groups: no negatives, wherever they come from."""


@dataclass(frozen=True, slots=True)
class Hit:
    """A passage at its place in a ranking."""

    passage_id: str
    score: float


@dataclass(frozen=True, slots=True)
class Ranking:
    """The ranked passages of one query, best first."""

    query_id: str
    hits: tuple[Hit, ...]
    unreadable: frozenset[str] = field(default=frozenset(), compare=False)
    """Ids of passages that no score could be given to: theirs say only that they come last."""

    @classmethod
    def from_scores(cls, query_id: str, scores: Iterable[tuple[str, float]]) -> Ranking:
        """Sort (passage id, score) pairs: the only sort in qpeft.

        Scores are rounded to float32 and sorted descending, ties by passage id descending: trec_eval's rule
        (it reads scores as C floats and compares ids as bytes), so that what is printed is what is evaluated.

        Raises:
            ScoreError: a score is NaN or infinite (also once rounded to float32), or a passage id occurs twice.
        """
        pairs = list(scores)
        with np.errstate(over="ignore"):
            values = np.array([score for _, score in pairs], dtype=np.float64).astype(np.float32)
        for (passage_id, score), value in zip(pairs, values, strict=True):
            if not np.isfinite(value):
                raise ScoreError(f"query {query_id!r}, passage {passage_id!r}: score {score} cannot be ranked")
        seen: set[str] = set()
        for passage_id, _ in pairs:
            if passage_id in seen:
                raise ScoreError(f"query {query_id!r}: passage {passage_id!r} occurs twice")
            seen.add(passage_id)
        hits = [Hit(passage_id, float(value)) for (passage_id, _), value in zip(pairs, values, strict=True)]
        hits.sort(key=lambda hit: hit.passage_id.encode(), reverse=True)
        hits.sort(key=lambda hit: hit.score, reverse=True)
        return cls(query_id, tuple(hits))

    def by_position(self) -> list[Hit]:
        """Return the hits with equal scores in the order given, for passages whose ids are their positions.

        Their scores may be compared with those of other rankings: what is unreadable has `UNREADABLE`.
        """
        hits = sorted(self.hits, key=lambda hit: (-hit.score, int(hit.passage_id)))
        return [Hit(hit.passage_id, UNREADABLE) if hit.passage_id in self.unreadable else hit for hit in hits]

    @property
    def constant(self) -> bool:
        """Whether several passages share one score: then the order is the tie rule's, not the model's."""
        return len(self.hits) > 1 and self.hits[0].score == self.hits[-1].score

    def followed_by(self, passage_ids: Iterable[str]) -> Ranking:
        """Return this ranking with more passages below all of its own, in the order given.

        Each gets a score below the one before it; the steps are large enough to survive float32.
        """
        lowest = self.hits[-1].score if self.hits else 0.0
        step = max(1.0, abs(lowest) * 1e-5)
        rest = (Hit(passage_id, lowest - step * place) for place, passage_id in enumerate(passage_ids, start=1))
        return replace(self, hits=(*self.hits, *rest))


class Run(Mapping[str, Ranking]):
    """Rankings by query id, in the order given, under a tag that names the system."""

    def __init__(self, rankings: Iterable[Ranking], tag: str) -> None:
        self.tag = tag
        self._rankings: dict[str, Ranking] = {}
        for ranking in rankings:
            if ranking.query_id in self._rankings:
                raise ScoreError(f"run {tag!r}: query {ranking.query_id!r} is ranked twice")
            self._rankings[ranking.query_id] = ranking

    def __getitem__(self, query_id: str) -> Ranking:
        return self._rankings[query_id]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rankings)

    def __len__(self) -> int:
        return len(self._rankings)

    def __repr__(self) -> str:
        return f"Run({self.tag!r}, {len(self)} queries)"


Qrels = Mapping[str, Mapping[str, int]]
"""query id → passage id → grade; a grade of 1 or more is relevant."""


class RankedPassage(TypedDict):
    """One entry of `Reranker.rank`, in the shape of sentence-transformers' `CrossEncoder.rank`."""

    corpus_id: int
    score: float
    text: NotRequired[str]


@dataclass(slots=True)
class ScoringCounts:
    """What happened to the input while it was scored; printed at the end and stored in provenance."""

    pairs: int = 0
    tokens: int = 0
    truncated_passages: int = 0
    empty_passages: int = 0
    constant_queries: int = 0

    def add(self, other: ScoringCounts) -> None:
        """Add the counts of another stretch of work."""
        self.pairs += other.pairs
        self.tokens += other.tokens
        self.truncated_passages += other.truncated_passages
        self.empty_passages += other.empty_passages
        self.constant_queries += other.constant_queries


class Scorer(Protocol):
    """A pointwise method is only this; `counts` grows with every call, `facts` are what provenance says of it."""

    counts: ScoringCounts
    facts: dict[str, Any]

    def check(self, query: Query) -> None:
        """Raise QueryError for a query that cannot be scored."""
        ...

    def score(self, pairs: Sequence[tuple[Query, Passage]]) -> list[float]:
        """Return one score per (query, passage) pair, in order."""
        ...


@dataclass(frozen=True, slots=True)
class QueryBatches:
    """Which queries are worked on together: so many, or as many as have so many candidates together."""

    queries: int | None = None
    pairs: int = 256
    """Enough that few batches are short or padded, few enough that an interruption costs little."""

    def split(self, items: Iterable[Candidates]) -> Iterator[list[Candidates]]:
        """Yield the items in lists, the last one with what is left, and read no further than that."""
        together: list[Candidates] = []
        pairs = 0
        for item in items:
            together.append(item)
            pairs += len(item.passages)
            if self._full(len(together), pairs):
                yield together
                together, pairs = [], 0
        if together:
            yield together

    def whole(self, sizes: Iterable[int]) -> int:
        """Return how many of the first queries stand in batches that are full, given the candidates of each."""
        whole = queries = pairs = 0
        for size in sizes:
            queries, pairs = queries + 1, pairs + size
            if self._full(queries, pairs):
                whole, queries, pairs = whole + queries, 0, 0
        return whole

    def _full(self, queries: int, pairs: int) -> bool:
        return pairs >= self.pairs if self.queries is None else queries >= self.queries


@dataclass(eq=False)
class Reranker(abc.ABC):
    """Orders candidates. Implementations define `rerank`; the rest is the same for all."""

    counts: ScoringCounts = field(default_factory=ScoringCounts, init=False)
    facts: dict[str, Any] = field(default_factory=dict, init=False)
    """What provenance says of the method: its template, its adapter."""
    query_batches: QueryBatches = field(default=QueryBatches(1), init=False)
    """Queries that are worked on together. Scores may depend, in their last bits, on the others."""
    scores_all: ClassVar[bool] = True
    """Whether all candidates are scored alike, so that their scores may be mixed with others."""

    @staticmethod
    def from_pretrained(model: str = "tiny-lm", *, method: str | None = None, **options: Any) -> Reranker:
        """Open a model and build a ranking method around it.

        Args:
            model: `tiny-lm` (embedded), a local folder, or a name on the model hub.
            method: name of a file in `qpeft.methods`; by default what an `adapter` was trained for, else query
                likelihood.
            options: fields of `qpeft.loading.ModelConfig` and of the method's `Config`.

        Raises:
            ModelError: the model cannot be opened.
            OptionError: an option that neither of the two has.
        """
        from qpeft.loading import load_reranker  # the one upward import: the front door (docs/decisions.md)

        return load_reranker(model, method=method, **options)

    @abc.abstractmethod
    def check(self, query: Query) -> None:
        """Raise the error that ranking this query would end in, so that it shows before the work and not in its midst.

        Raises:
            QueryError: the query is empty or does not fit.
        """

    @abc.abstractmethod
    def rerank(self, items: Iterable[Candidates]) -> Iterator[Ranking]:
        """Yield one ranking per item, lazily and in order."""

    @overload
    def predict(self, pairs: tuple[str, str | Passage]) -> float: ...

    @overload
    def predict(self, pairs: Sequence[tuple[str, str | Passage]]) -> list[float]: ...

    @final
    def predict(self, pairs: tuple[str, str | Passage] | Sequence[tuple[str, str | Passage]]) -> float | list[float]:
        """Return a score per (query text, passage text), as sentence-transformers' `CrossEncoder.predict` does.

        Consecutive pairs with the same query are ranked as one list of candidates. A single pair gets a single score.
        In the place of a passage's text a `Passage` may stand, which has a title too.

        Raises:
            OptionError: what is given is neither pairs of texts nor one.
        """
        given = as_list(pairs, "pairs")
        if given and isinstance(given[0], str):
            return self.predict([_pair(given, 0)])[0]
        pairs = [_pair(each, place) for place, each in enumerate(given)]
        groups = groupby(pairs, key=itemgetter(0))
        scores: list[float] = []
        for ranking in self.rerank([_candidates(query, [text for _, text in group]) for query, group in groups]):
            by_position = {int(hit.passage_id): hit.score for hit in ranking.by_position()}
            scores += [by_position[position] for position in range(len(by_position))]
        return scores

    @final
    def rank(
        self, query: str, passages: Sequence[str | Passage], *, top_k: int | None = None, return_documents: bool = False
    ) -> list[RankedPassage]:
        """Rank texts, or passages with titles, for one query, best first; equal scores keep the order given.

        Returns:
            Entries of sentence-transformers' shape: `corpus_id` is the index into `passages`.

        Raises:
            OptionError: `top_k` is less than 1, or `passages` is one text.
        """
        passages = as_list(passages, "passages")
        if top_k is not None and (not isinstance(top_k, SupportsIndex) or index(top_k) < 1):
            raise OptionError(f"top_k is {top_k!r}; it must be a whole number of at least 1")
        ranked: list[RankedPassage] = []
        (found,) = self.rerank([_candidates(query, passages)])
        for hit in found.by_position()[:top_k]:
            given = passages[int(hit.passage_id)]
            entry = RankedPassage(corpus_id=int(hit.passage_id), score=hit.score)
            if return_documents:
                entry["text"] = given.text if isinstance(given, Passage) else given
            ranked.append(entry)
        return ranked


def as_list(texts: Iterable[T], what: str) -> list[T]:
    """Return a list.

    Raises:
        OptionError: it is one text, which would be read letter by letter, or a table, by its columns' names.
    """
    if isinstance(texts, str):
        raise OptionError(f"{what} is one text, {texts!r:.60}, not a list")
    if isinstance(texts, Mapping | Set) or hasattr(texts, "columns"):
        raise OptionError(f"{what} is a {type(texts).__name__}, not a list")
    return list(texts)


def _pair(pair: Any, place: int) -> tuple[str, str | Passage]:
    if isinstance(pair, str | bytes) or not isinstance(pair, Sequence | np.ndarray) or len(pair) != 2:
        raise OptionError(f"pair {place} is {pair!r:.60}, not a pair of a query and a passage")
    return pair[0], pair[1]


def _candidates(query: str, passages: Sequence[str | Passage]) -> Candidates:
    named = (replace(p, id=str(i)) if isinstance(p, Passage) else Passage(str(i), p) for i, p in enumerate(passages))
    return Candidates(Query("query", query), tuple(named))
