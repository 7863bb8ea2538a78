"""What clients get back. Fields that are None are not sent."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, Field, RootModel

from qpeft.server.dialects.requests import (
    Document,
    PartlyRead,
    RerankBatch,
    RerankDocuments,
    RerankTei,
    RerankV1,
    RerankV2,
)
from qpeft.server.ranking import Answer, Result

DOCUMENTS_PER_SEARCH_UNIT = 100
"""Cohere's unit: one query with up to so many documents."""


class ShownDocument(BaseModel):
    """A document of the request."""

    text: str
    title: str | None = None


class SentDocument(RootModel[dict[str, Any]]):
    """A document of the request with all of its fields, where `rank_fields` says which of them were read."""


class Ranked(BaseModel):
    """A document at its place; `index` is its position in the request."""

    index: int
    relevance_score: float
    document: ShownDocument | SentDocument | None = None
    explanation: dict[str, Any] | None = Field(
        None, description="As `qpeft explain --json` prints it; absent for a document without tokens."
    )


class Usage(BaseModel):
    """Tokens that the model read."""

    prompt_tokens: int
    total_tokens: int


class ApiVersion(BaseModel):
    """Which of Cohere's APIs this is."""

    version: str
    is_experimental: bool = False


class BilledUnits(BaseModel):
    """Nobody is billed, but clients read it."""

    search_units: int


class Tokens(BaseModel):
    """Tokens that the model read."""

    input_tokens: int
    output_tokens: int = 0


class Meta(BaseModel):
    """Cohere's facts about a response."""

    api_version: ApiVersion
    billed_units: BilledUnits
    tokens: Tokens
    warnings: list[str] | None = None


class Reranked(BaseModel):
    """Cohere's response, with the `model` and `usage` of Jina's and vLLM's."""

    id: str
    model: str
    results: list[Ranked]
    meta: Meta
    usage: Usage


class TeiRank(BaseModel):
    """One of TEI's results."""

    index: int
    text: str | None = None
    score: float


class RankedText(BaseModel):
    """One of infinity's results, or of vLLM's."""

    index: int
    relevance_score: float
    document: str | ShownDocument | None = Field(None, description="infinity: a text; vLLM: an object.")


class RerankedDocuments(BaseModel):
    """infinity's response, which has what vLLM's has."""

    object: Literal["rerank"] = "rerank"
    id: str
    created: int
    model: str
    results: list[RankedText]
    usage: Usage


class Ranking(BaseModel):
    """The results of one query of a batch; `index` is its position."""

    index: int
    results: list[Ranked]


class RerankedBatch(BaseModel):
    """One ranking per query, in order."""

    id: str
    model: str
    rankings: list[Ranking]
    usage: Usage


class PairScore(BaseModel):
    """The score of a pair at its position."""

    index: int
    object: Literal["score"] = "score"
    score: float


class ScoreUsage(Usage):
    """Tokens that the model read; it wrote none."""

    completion_tokens: int = 0


class Scores(BaseModel):
    """vLLM's list of scores."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[PairScore]
    usage: ScoreUsage


def reranked(request: RerankV2, model: str, answer: Answer) -> Reranked:
    """Return the response of `/v1/rerank` and `/v2/rerank`."""
    meta = Meta(
        api_version=ApiVersion(version="1" if isinstance(request, RerankV1) else "2"),
        billed_units=BilledUnits(search_units=-(-len(request.documents) // DOCUMENTS_PER_SEARCH_UNIT)),
        tokens=Tokens(input_tokens=answer.tokens),
        warnings=[f"documents that were cut to fit: {answer.truncated}"] if answer.truncated else None,
    )
    results = _ranked(answer, request.documents if request.return_documents else None)
    return Reranked(id=_id("rerank"), model=model, results=results, meta=meta, usage=_usage([answer]))


def tei_ranks(request: RerankTei, answer: Answer) -> list[TeiRank]:
    """Return TEI's list."""
    return [
        TeiRank(
            index=result.index, text=request.texts[result.index] if request.return_text else None, score=result.score
        )
        for result in answer.results
    ]


def reranked_documents(request: RerankDocuments, model: str, answer: Answer) -> RerankedDocuments:
    """Return infinity's response, whose documents are texts, or vLLM's, whose documents are objects."""

    def shown(result: Result) -> str | ShownDocument | None:
        if not request.wants_documents:
            return None
        document = _shown(request.documents[result.index])
        return document.text if request.of_infinity else document

    results = [
        RankedText(index=result.index, relevance_score=result.score, document=shown(result))
        for result in answer.results
    ]
    return RerankedDocuments(
        id=_id("rerank"), created=int(time.time()), model=model, results=results, usage=_usage([answer])
    )


def reranked_batch(request: RerankBatch, model: str, answers: Sequence[Answer]) -> RerankedBatch:
    """Return one ranking per query."""
    rankings = [
        Ranking(index=place, results=_ranked(answer, each.documents if request.return_documents else None))
        for place, (each, answer) in enumerate(zip(request.queries, answers, strict=True))
    ]
    return RerankedBatch(id=_id("rerank"), model=model, rankings=rankings, usage=_usage(answers))


def scores(model: str, answers: Sequence[Answer]) -> Scores:
    """Return the scores of pairs in the order of the documents."""
    in_order = [result.score for answer in answers for result in sorted(answer.results, key=lambda each: each.index)]
    return Scores(
        id=_id("score"),
        created=int(time.time()),
        model=model,
        data=[PairScore(index=index, score=score) for index, score in enumerate(in_order)],
        usage=ScoreUsage(**_usage(answers).model_dump()),
    )


def _id(kind: str) -> str:
    return f"{kind}-{uuid.uuid4().hex}"


def _usage(answers: Sequence[Answer]) -> Usage:
    tokens = sum(answer.tokens for answer in answers)
    return Usage(prompt_tokens=tokens, total_tokens=tokens)


def _ranked(answer: Answer, documents: Sequence[str | Document] | None) -> list[Ranked]:
    return [
        Ranked(
            index=result.index,
            relevance_score=result.score,
            document=None if documents is None else _returned(documents[result.index]),
            explanation=result.explanation,
        )
        for result in answer.results
    ]


def _returned(document: str | Document) -> ShownDocument | SentDocument:
    return SentDocument(document.sent) if isinstance(document, PartlyRead) else _shown(document)


def _shown(document: str | Document) -> ShownDocument:
    if isinstance(document, str):
        return ShownDocument(text=document)
    return ShownDocument(text=document.text, title=document.title or None)
