"""From scores to ranked results: the floor, the order, the scale, and the reasons. Knows nothing of HTTP."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qpeft.analysis.explain import as_record, explain
from qpeft.errors import InputError
from qpeft.methods._pointwise import floor_unreadable
from qpeft.server.batcher import Batcher, Scored
from qpeft.server.models import ServedModel
from qpeft.types import Passage, Query, Ranking

MAX_EXPLAINED = 64
"""Documents of a request whose scores are explained; it occupies the model as long as no other request may."""


class TruncatedError(InputError):
    """A document does not fit, and the client wants none cut."""


@dataclass(frozen=True)
class Search:
    """One query with its candidates, and what is wanted of them.

    `top_n` None: all. `raw`: nats per query token instead of a probability. `max_passage_tokens`: cut documents there.
    `may_cut` False: a document that does not fit is an error. `explain`: reasons too. `name` stands in messages.
    """

    query: str
    documents: Sequence[Passage]
    top_n: int | None = None
    raw: bool = False
    max_passage_tokens: int | None = None
    may_cut: bool = True
    explain: bool = False
    name: str = "query"


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


async def rank(batcher: Batcher, model: ServedModel, search: Search) -> Answer:
    """Rank the documents of a query.

    Raises:
        QueryError: the query is empty or leaves no room for a document.
        TruncatedError: a document does not fit and may not be cut.
        ScoreError: the model gave a score that is no number.
        OverloadedError: the queue is full.
    """
    query = Query(search.name, search.query)
    pairs = [(query, document) for document in search.documents]
    scored = await batcher.score(model.scorer, pairs, search.max_passage_tokens)
    if not search.may_cut and any(scored.truncated):
        raise TruncatedError(f"document {scored.truncated.index(True)} does not fit, and truncate is false")
    hits = Ranking.from_scores("query", floored(scored.scores)).by_position()[: search.top_n]
    shown = dict(hits_shown(model, scored, [(int(hit.passage_id), hit.score) for hit in hits], search.raw))
    reasons = await _reasons(batcher, model, search, query, scored) if search.explain else {}
    results = [Result(index, score, reasons.get(index)) for index, score in shown.items()]
    return Answer(results, scored.tokens, sum(scored.truncated))


def floored(scores: Sequence[float]) -> list[tuple[str, float]]:
    """Return (position, score) of one query's documents, with a finite score for those that cannot be read."""
    return floor_unreadable("query", [(str(index), score) for index, score in enumerate(scores)])


def hits_shown(
    model: ServedModel, scored: Scored, hits: Sequence[tuple[int, float]], raw: bool
) -> list[tuple[int, float]]:
    """Return (position, score as the client sees it): nats, or a probability, which is 0 for what cannot be read."""
    if raw:
        return list(hits)
    readable = [index for index, _ in hits if scored.scores[index] != -math.inf]
    values = [score for index, score in hits if scored.scores[index] != -math.inf]
    if model.calibration is None:
        likely = dict(zip(readable, (min(1.0, math.exp(value)) for value in values), strict=True))
    else:
        likely = dict(zip(readable, map(float, model.calibration(values)), strict=True))
    return [(index, likely.get(index, 0.0)) for index, _ in hits]


async def _reasons(
    batcher: Batcher, model: ServedModel, search: Search, query: Query, scored: Scored
) -> dict[int, dict[str, Any]]:
    """Return the explanations of the documents that can be read, by position."""
    readable = [index for index, score in enumerate(scored.scores) if score != -math.inf]
    passages = [Passage(str(index), search.documents[index].text, search.documents[index].title) for index in readable]
    if not passages:
        return {}
    prompt = model.scorer.prompt
    bounds = [bound for bound in (search.max_passage_tokens, prompt.max_passage_tokens) if bound is not None]
    found = await batcher.run(
        lambda: explain(
            model.scorer.lm,
            model.adapter,
            prompt.template,
            query,
            passages,
            max_passage_tokens=min(bounds, default=None),
        )
    )
    return {index: as_record(each) for index, each in zip(readable, found, strict=True)}
