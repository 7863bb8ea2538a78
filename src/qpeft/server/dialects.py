"""The wire formats: what each client sends, and what it expects back. No logic of ranking.

    POST /v1/rerank        Cohere v1, Jina, vLLM      documents may be texts or {"text", "title"}
    POST /v2/rerank        Cohere v2, vLLM
    POST /rerank           TEI by its `texts`; by its `documents` vLLM, or infinity where `raw_scores` is there too
    POST /score            vLLM
    POST /v1/rerank/batch  qpeft's own: many queries

Fields that are not listed here are ignored, as the peers do.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Discriminator, Field, Tag, model_validator

from qpeft.server.ranking import Answer, Result, Search
from qpeft.types import Passage


def _whole(value: Any) -> Any:
    """Join surrogate pairs and replace lone surrogates, which no tokenizer takes, by U+FFFD."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return value


Text = Annotated[str, BeforeValidator(_whole)]
Query = Annotated[Text, Field(min_length=1, description="Never cut.")]
TopN = Annotated[int | None, Field(ge=0, description="Return the best so many; 0 or nothing: all.")]
MaxTokensPerDoc = Annotated[int | None, Field(ge=1, description="Cut documents to so many tokens.")]
RawScores = Annotated[bool, Field(description="Nats per query token instead of a score in [0, 1].")]
Explain = Annotated[bool, Field(description="Add what made the scores: log-probabilities of the query's tokens.")]


class Document(BaseModel):
    """A text with a title; other fields count where `rank_fields` names them."""

    model_config = {"extra": "allow"}

    text: Text = ""
    title: Text = ""


AnyDocument = Annotated[
    Annotated[Text, Tag("text")] | Annotated[Document, Tag("object")],
    Discriminator(lambda value: "text" if isinstance(value, str) else "object"),
]
Documents = Annotated[list[AnyDocument], Field(min_length=1)]


def _passage(document: str | Document, rank_fields: Sequence[str] | None = None) -> Passage:
    if isinstance(document, str):
        return Passage("document", document)
    if rank_fields is None:
        return Passage("document", document.text, document.title)
    values = [_whole(getattr(document, name, None)) for name in rank_fields]
    return Passage("document", " ".join(str(value) for value in values if isinstance(value, str | int | float)))


class RerankV2(BaseModel):
    """Cohere v2 and vLLM."""

    model: str | None = None
    query: Query
    documents: Documents
    top_n: TopN = None
    max_tokens_per_doc: MaxTokensPerDoc = None
    return_documents: bool = False
    raw_scores: RawScores = False
    use_activation: Annotated[bool | None, Field(description="vLLM's opposite of raw_scores.")] = None
    explain: Explain = False

    def search(self) -> Search:
        """Return what is asked for."""
        return Search(
            self.query,
            [_passage(document) for document in self.documents],
            self.top_n or None,
            self.raw_scores or self.use_activation is False,
            self.max_tokens_per_doc,
            explain=self.explain,
        )


class RerankV1(RerankV2):
    """Cohere v1, Jina and vLLM; documents come back unless `return_documents` is false, as Jina and vLLM do."""

    return_documents: bool = True
    rank_fields: Annotated[list[str] | None, Field(min_length=1, description="Fields of a document to read.")] = None

    def search(self) -> Search:
        """Return what is asked for."""
        found = super().search()
        passages = [_passage(document, self.rank_fields) for document in self.documents]
        return Search(found.query, passages, found.top_n, found.raw, found.max_passage_tokens, explain=found.explain)


class RerankTei(BaseModel):
    """Text Embeddings Inference."""

    model: str | None = None
    query: Query
    texts: list[Text]
    raw_scores: RawScores = False
    return_text: bool = False
    truncate: Annotated[bool | None, Field(description="false: a text that does not fit is an error.")] = None
    truncation_direction: Literal["right", "Right"] = "right"

    def search(self) -> Search:
        """Return what is asked for."""
        passages = [Passage("document", text) for text in self.texts]
        return Search(self.query, passages, raw=self.raw_scores, may_cut=self.truncate is not False)


class RerankDocuments(RerankV2):
    """infinity, or vLLM where there are no `raw_scores`."""

    return_documents: bool | None = None  # type: ignore[assignment]
    raw_scores: bool | None = None  # type: ignore[assignment]

    def search(self) -> Search:
        """Return what is asked for."""
        found = super().search()
        return Search(found.query, found.documents, found.top_n, bool(found.raw), found.max_passage_tokens)


def _by_field(body: Any) -> str:
    return "tei" if isinstance(body, dict) and "texts" in body else "documents"


AnyRerank = Annotated[
    Annotated[RerankTei, Tag("tei")] | Annotated[RerankDocuments, Tag("documents")], Discriminator(_by_field)
]


class Queries(BaseModel):
    """One of the queries of a batch."""

    query: Query
    documents: Documents
    top_n: TopN = None


class RerankBatch(BaseModel):
    """Many queries at once."""

    model: str | None = None
    queries: Annotated[list[Queries], Field(min_length=1)]
    top_n: Annotated[int | None, Field(ge=0, description="For queries that have none of their own.")] = None
    max_tokens_per_doc: MaxTokensPerDoc = None
    return_documents: bool = False
    raw_scores: RawScores = False

    def searches(self) -> list[Search]:
        """Return what is asked for, query by query."""
        return [
            Search(
                each.query,
                [_passage(document) for document in each.documents],
                (self.top_n if each.top_n is None else each.top_n) or None,
                self.raw_scores,
                self.max_tokens_per_doc,
            )
            for each in self.queries
        ]


class Score(BaseModel):
    """vLLM's pairs: one query with N documents, or N with N; `text_1` and `queries`, `text_2` and `documents` are one."""

    model: str | None = None
    text_1: Text | list[Text] | None = None
    text_2: Text | list[Text] | None = None
    queries: Text | list[Text] | None = None
    documents: Text | list[Text] | None = None
    items: Text | list[Text] | None = None
    raw_scores: RawScores = False
    use_activation: Annotated[bool | None, Field(description="vLLM's opposite of raw_scores.")] = None

    @model_validator(mode="after")
    def _check(self) -> Score:
        queries, documents = self.both()
        if not queries or not documents:
            raise ValueError("give text_1 and text_2, or queries and documents")
        if len(queries) not in (1, len(documents)):
            raise ValueError(f"{len(queries)} queries but {len(documents)} documents; give 1 to N or N to N")
        return self

    def both(self) -> tuple[list[str], list[str]]:
        """Return queries and documents."""
        left = self.queries if self.text_1 is None else self.text_1
        right = next((each for each in (self.text_2, self.documents, self.items) if each is not None), None)
        return _listed(left), _listed(right)

    def searches(self) -> list[Search]:
        """Return one search for 1 to N, else one for each pair."""
        queries, documents = self.both()
        raw = self.raw_scores or self.use_activation is False
        passages = [Passage("document", text) for text in documents]
        if len(queries) == 1:
            return [Search(queries[0], passages, raw=raw)]
        return [Search(query, [passage], raw=raw) for query, passage in zip(queries, passages, strict=True)]


def _listed(value: str | list[str] | None) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else value


def _usage(answers: Sequence[Answer]) -> dict[str, int]:
    tokens = sum(answer.tokens for answer in answers)
    return {"prompt_tokens": tokens, "total_tokens": tokens}


def _results(answer: Answer, documents: Sequence[str | Document] | None) -> list[dict[str, Any]]:
    return [_result(result, documents) for result in answer.results]


def _result(result: Result, documents: Sequence[str | Document] | None) -> dict[str, Any]:
    shown: dict[str, Any] = {"index": result.index, "relevance_score": result.score}
    if documents is not None:
        document = documents[result.index]
        shown["document"] = _document(document)
    if result.explanation is not None:
        shown["explanation"] = result.explanation
    return shown


def _document(document: str | Document) -> dict[str, str]:
    if isinstance(document, str):
        return {"text": document}
    return {"text": document.text, **({"title": document.title} if document.title else {})}


def _meta(version: str, answer: Answer, documents: int) -> dict[str, Any]:
    """Return Cohere's block of facts; a search unit is a query with up to 100 documents."""
    meta: dict[str, Any] = {
        "api_version": {"version": version, "is_experimental": False},
        "billed_units": {"search_units": -(-documents // 100)},
        "tokens": {"input_tokens": answer.tokens, "output_tokens": 0},
    }
    if answer.truncated:
        meta["warnings"] = [f"{answer.truncated} documents were cut to fit"]
    return meta


def rerank_response(request: RerankV2, model: str, answer: Answer, version: str) -> dict[str, Any]:
    """Return the response of `/v1/rerank` and `/v2/rerank`: Cohere's `meta`, and vLLM's and Jina's `usage`."""
    return {
        "id": f"rerank-{uuid.uuid4().hex}",
        "model": model,
        "results": _results(answer, request.documents if request.return_documents else None),
        "meta": _meta(version, answer, len(request.documents)),
        "usage": _usage([answer]),
    }


def tei_response(request: RerankTei, answer: Answer) -> list[dict[str, Any]]:
    """Return TEI's list."""
    return [
        {
            "index": result.index,
            **({"text": request.texts[result.index]} if request.return_text else {}),
            "score": result.score,
        }
        for result in answer.results
    ]


def documents_response(request: RerankDocuments, model: str, answer: Answer) -> dict[str, Any]:
    """Return infinity's response, whose documents are texts, or vLLM's, whose documents are objects."""
    of_infinity = request.raw_scores is not None
    wanted = request.return_documents if request.return_documents is not None else not of_infinity
    results = _results(answer, request.documents if wanted else None)
    if of_infinity and wanted:
        for result in results:
            result["document"] = result["document"].get("text", "")
    return {
        "object": "rerank",
        "id": f"rerank-{uuid.uuid4().hex}",
        "created": int(time.time()),
        "model": model,
        "results": results,
        "usage": _usage([answer]),
    }


def batch_response(request: RerankBatch, model: str, answers: Sequence[Answer]) -> dict[str, Any]:
    """Return one ranking per query, in order."""
    rankings = [
        {"index": place, "results": _results(answer, each.documents if request.return_documents else None)}
        for place, (each, answer) in enumerate(zip(request.queries, answers, strict=True))
    ]
    return {"id": f"rerank-{uuid.uuid4().hex}", "model": model, "rankings": rankings, "usage": _usage(answers)}


def score_response(model: str, answers: Sequence[Answer]) -> dict[str, Any]:
    """Return vLLM's list of scores, in the order of the documents."""
    if len(answers) == 1:
        scores = [result.score for result in sorted(answers[0].results, key=lambda result: result.index)]
    else:
        scores = [answer.results[0].score for answer in answers]
    return {
        "id": f"score-{uuid.uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": model,
        "data": [{"index": index, "object": "score", "score": score} for index, score in enumerate(scores)],
        "usage": {**_usage(answers), "completion_tokens": 0},
    }
