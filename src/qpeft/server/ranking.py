"""From scores to ranked results: the floor, the order, the scale, and the reasons. Knows nothing of HTTP."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qpeft.analysis.explain import as_record, explain
from qpeft.errors import InputError
from qpeft.pointwise import ranked
from qpeft.server.batcher import Batcher, Scored
from qpeft.server.models import ServedModel
from qpeft.types import Passage, Query

MAX_EXPLAINED = 64
"""Documents of a request whose scores are explained; it occupies the model as long as no other request may."""


class TruncatedError(InputError):
    """A document does not fit, and the client wants none cut."""


class NoReasonsError(InputError):
    """Reasons are asked for, of a method that gives none."""


@dataclass(frozen=True)
class Search:
    """One query with its candidates; `top_n` None: all of them come back. `name` stands in messages."""

    query: str
    documents: Sequence[Passage]
    top_n: int | None = None
    name: str = "query"


@dataclass(frozen=True)
class Ask:
    """What one request wants of one model.

    `raw`: the method's own score (of query likelihood, nats per query token) instead of a probability.
    `max_passage_tokens`: documents are cut there. `may_cut` False: a document that does not fit is an error. `explain`:
    reasons too.
    """

    searches: Sequence[Search]
    raw: bool = False
    max_passage_tokens: int | None = None
    may_cut: bool = True
    explain: bool = False


@dataclass(frozen=True)
class Result:
    """A document at its place; `index` is its position in the request."""

    index: int
    score: float
    explanation: dict[str, Any] | None = None


@dataclass(frozen=True)
class Answer:
    """The results of one query, best first; tokens that the model read; documents that were cut."""

    results: list[Result]
    tokens: int
    truncated: int


async def rank(batcher: Batcher, model: ServedModel, ask: Ask) -> list[Answer]:
    """Rank the documents of each query; all of them wait in the queue as one.

    Raises:
        QueryError: a query is empty or leaves no room for a document.
        TruncatedError: a document does not fit and may not be cut.
        NoReasonsError: only query likelihood has reasons.
        ScoreError: the model gave a score that is no number.
        OverloadedError: the queue is full.
    """
    if ask.explain and model.method != "query_likelihood":
        raise NoReasonsError(f"explain: {model.name} scores by the method {model.method}, which gives no reasons")
    pairs = [
        (query, document)
        for search in ask.searches
        for query in [Query(search.name, search.query)]
        for document in search.documents
    ]
    scored = await batcher.score(model.scorer, pairs, ask.max_passage_tokens)
    answers = []
    start = 0
    for search in ask.searches:
        own = scored.part(start, start + len(search.documents))
        answers.append(await _answer(batcher, model, ask, search, own))
        start += len(search.documents)
    return answers


async def _answer(batcher: Batcher, model: ServedModel, ask: Ask, search: Search, scored: Scored) -> Answer:
    if not ask.may_cut and any(scored.truncated):
        raise TruncatedError(f"document {scored.truncated.index(True)} does not fit, and truncate is false")
    scores = [(str(index), score) for index, score in enumerate(scored.scores)]
    hits = [(int(hit.passage_id), hit.score) for hit in ranked(search.name, scores).by_position()]
    shown = hits if ask.raw else _probabilities(model, scored, hits)
    reasons = await _reasons(batcher, model, ask, search, scored) if ask.explain else {}
    results = [Result(index, score, reasons.get(index)) for index, score in shown[: search.top_n]]
    return Answer(results, sum(scored.tokens), sum(scored.truncated))


def _probabilities(model: ServedModel, scored: Scored, hits: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return (position, probability): the calibrated one, else what the method says.

    `hits` are all of a query's, since a calibration may compare them. What cannot be read has 0.
    """
    readable = [(index, score) for index, score in hits if scored.scores[index] != -math.inf]
    values = [score for _, score in readable]
    if model.calibration is not None:
        likely = [float(value) for value in model.calibration(values)]
    else:
        likely = [model.scorer.probability(value) for value in values]
    found = dict(zip((index for index, _ in readable), likely, strict=True))
    return [(index, found.get(index, 0.0)) for index, _ in hits]


async def _reasons(
    batcher: Batcher, model: ServedModel, ask: Ask, search: Search, scored: Scored
) -> dict[int, dict[str, Any]]:
    """Return the explanations of the documents that can be read, by position."""
    readable = [index for index, score in enumerate(scored.scores) if score != -math.inf]
    passages = [Passage(str(index), search.documents[index].text, search.documents[index].title) for index in readable]
    if not passages:
        return {}
    query = Query(search.name, search.query)
    found = await batcher.run(lambda: explain(model.scorer, query, passages, max_passage_tokens=ask.max_passage_tokens))
    return {index: as_record(each) for index, each in zip(readable, found, strict=True)}
