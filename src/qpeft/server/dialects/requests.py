"""What clients send, and what that asks for."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Discriminator,
    Field,
    Json,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from qpeft.server.ranking import Ask, Search
from qpeft.types import Passage, whole

UNSPECIFIED = "default/not-specified"
"""What infinity's client sends as `model` when it was given none."""


def _whole(value: Any) -> Any:
    return whole(value) if isinstance(value, str) else value


def _unless_null(default: Any) -> Callable[[Any], Any]:
    """Return what takes null for a default; many clients send it for what they were not given."""
    return lambda value: default if value is None else value


Text = Annotated[str, BeforeValidator(_whole)]
Model = Annotated[Text | None, Field(description="BASE:ADAPTER, or BASE or nothing for the model alone.")]
QueryText = Annotated[Text, Field(min_length=1, description="Never cut.")]
TopN = Annotated[int | None, Field(ge=0, description="Return the best so many; 0 or nothing: all.")]
MaxTokensPerDoc = Annotated[
    int | None,
    Field(ge=0, description="Cut documents to so many tokens; 0 or nothing: to what fits."),
    AfterValidator(lambda value: value or None),
]
Off = BeforeValidator(_unless_null(False))
On = BeforeValidator(_unless_null(True))
RawScores = Annotated[bool, Off, Field(description="The method's own score instead of one in [0, 1].")]
UseActivation = Annotated[bool | None, Field(description="vLLM's name for the opposite of raw_scores.")]
Explain = Annotated[bool, Off, Field(description="Add what made the scores: log-probabilities of the query's tokens.")]


class Document(BaseModel):
    """A text, and perhaps a title."""

    text: Text
    title: Annotated[Text, BeforeValidator(_unless_null(""))] = ""


class PartlyRead(Document):
    """A document of which the `rank_fields` are read, as `text`; `sent` is all of it, given as JSON."""

    sent: Json[dict[str, Any]]


# Unions are decided by looking, so that an error is about what was meant. A tag stands in pydantic's locations of
# errors; one in parentheses is not taken for a field (`field_of`).
AnyDocument = Annotated[
    Annotated[Text, Tag("(text)")] | Annotated[Document, Tag("(object)")],
    Discriminator(lambda value: "(text)" if isinstance(value, str) else "(object)"),
]
Texts = Annotated[
    Annotated[Text, Tag("(text)")] | Annotated[list[Text], Tag("(list)")],
    Discriminator(lambda value: "(text)" if isinstance(value, str) else "(list)"),
]
Documents = Annotated[list[AnyDocument], Field(min_length=1)]


def field_of(location: Sequence[str | int]) -> str:
    """Return the field that one of pydantic's locations of errors points to, such as `documents.3.text`."""
    return ".".join(str(part) for part in location if not str(part).startswith("("))


def _passages(documents: Sequence[str | Document]) -> list[Passage]:
    return [
        Passage("document", each) if isinstance(each, str) else Passage("document", each.text, each.title)
        for each in documents
    ]


class RerankV2(BaseModel):
    """Cohere v2 and vLLM."""

    model: Model = None
    query: QueryText
    documents: Documents
    top_n: TopN = None
    max_tokens_per_doc: MaxTokensPerDoc = None
    return_documents: Annotated[bool, Off] = False
    raw_scores: RawScores = False
    use_activation: UseActivation = None
    explain: Explain = False

    def ask(self) -> Ask:
        """Return what is asked for."""
        return Ask(
            [Search(self.query, _passages(self.documents), self.top_n or None)],
            raw=self.raw_scores or self.use_activation is False,
            max_passage_tokens=self.max_tokens_per_doc,
            explain=self.explain,
        )


class RerankV1(RerankV2):
    """Cohere v1, Jina and vLLM; documents come back unless `return_documents` is false, as with Jina and vLLM."""

    rank_fields: Annotated[list[Text] | None, Field(min_length=1, description="Fields of a document to read.")] = None
    return_documents: Annotated[bool, On] = True

    @model_validator(mode="before")
    @classmethod
    def _read_fields(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        fields, documents = body.get("rank_fields"), body.get("documents")
        if not isinstance(fields, list) or not all(isinstance(field, str) for field in fields):
            return body
        if not fields or not isinstance(documents, list):
            return body
        return {**body, "documents": [_partly_read(each, fields, place) for place, each in enumerate(documents)]}


def _partly_read(document: Any, fields: Sequence[str], place: int) -> Any:
    """Join what the fields hold: texts, numbers, and lists of them.

    Raises:
        ValidationError: of `rank_fields`; none of them is there, or one holds something else.
    """
    if not isinstance(document, dict):
        return document
    parts: list[str | float] = []
    for field in fields:
        value = document.get(field)
        found = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(each, str | int | float) for each in found):
            raise _wrong_fields(f"{field!r:.60} of document {place} is neither text nor number nor a list of them")
        parts += found
    if not parts:
        raise _wrong_fields(f"document {place} has none of these fields")
    try:
        sent = whole(json.dumps(document, ensure_ascii=False))
        return PartlyRead.model_validate({"text": " ".join(map(str, parts)), "sent": sent})
    except (ValidationError, RecursionError):
        raise _wrong_fields(f"document {place} is nested too deep") from None


def _wrong_fields(message: str) -> ValidationError:
    error = PydanticCustomError("rank_fields", "{message}", {"message": message})
    return ValidationError.from_exception_data("rank_fields", [{"type": error, "loc": ("rank_fields",), "input": None}])


class RerankTei(BaseModel):
    """Text Embeddings Inference."""

    model: Model = None
    query: QueryText
    texts: list[Text]
    raw_scores: RawScores = False
    return_text: Annotated[bool, Off] = False
    truncate: Annotated[bool | None, Field(description="false: a text that does not fit is an error.")] = None
    truncation_direction: Annotated[
        Literal["right", "Right"],
        BeforeValidator(_unless_null("right")),
        Field(description="Texts are cut at their end."),
    ] = "right"

    def ask(self) -> Ask:
        """Return what is asked for."""
        searches = [Search(self.query, _passages(self.texts))]
        return Ask(searches, raw=self.raw_scores, may_cut=self.truncate is not False)


class RerankDocuments(BaseModel):
    """infinity where there are `raw_scores`, else vLLM."""

    model: Model = None
    query: QueryText
    documents: Documents
    top_n: TopN = None
    max_tokens_per_doc: MaxTokensPerDoc = None
    return_documents: bool | None = None
    raw_scores: bool | None = None
    use_activation: UseActivation = None

    @property
    def of_infinity(self) -> bool:
        """Whether the client is infinity's, which always says `raw_scores`."""
        return self.raw_scores is not None

    @property
    def wants_documents(self) -> bool:
        """Whether documents come back: vLLM's always, unless they are declined; infinity's where asked for."""
        return not self.of_infinity if self.return_documents is None else self.return_documents

    def ask(self) -> Ask:
        """Return what is asked for."""
        return Ask(
            [Search(self.query, _passages(self.documents), self.top_n or None)],
            raw=bool(self.raw_scores) or self.use_activation is False,
            max_passage_tokens=self.max_tokens_per_doc,
        )


def of_tei(body: Any) -> bool:
    """Return whether a body is TEI's: it has `texts`."""
    return isinstance(body, dict) and body.get("texts") is not None


AnyRerank = Annotated[
    Annotated[RerankTei, Tag("(tei)")] | Annotated[RerankDocuments, Tag("(documents)")],
    Discriminator(lambda body: "(tei)" if of_tei(body) else "(documents)"),
]


class OneOfMany(BaseModel):
    """One of the queries of a batch."""

    query: QueryText
    documents: Documents
    top_n: TopN = None


class RerankBatch(BaseModel):
    """Many queries at once."""

    model: Model = None
    queries: Annotated[list[OneOfMany], Field(min_length=1)]
    top_n: Annotated[int | None, Field(ge=0, description="For queries that have none of their own.")] = None
    max_tokens_per_doc: MaxTokensPerDoc = None
    return_documents: Annotated[bool, Off] = False
    raw_scores: RawScores = False

    def ask(self) -> Ask:
        """Return what is asked for, query by query."""
        searches = [
            Search(
                each.query,
                _passages(each.documents),
                (self.top_n if each.top_n is None else each.top_n) or None,
                f"queries.{place}",
            )
            for place, each in enumerate(self.queries)
        ]
        return Ask(searches, raw=self.raw_scores, max_passage_tokens=self.max_tokens_per_doc)


class Score(BaseModel):
    """vLLM's pairs, one query with N documents, or N with N.

    `text_1` and `queries` are one, and so are `text_2`, `documents` and `items`.
    """

    model: Model = None
    text_1: Texts | None = None
    text_2: Texts | None = None
    queries: Texts | None = None
    documents: Texts | None = None
    items: Texts | None = None
    raw_scores: RawScores = False
    use_activation: UseActivation = None

    @model_validator(mode="after")
    def _check(self) -> Score:
        queries, documents = self._sides()
        if not queries or not documents:
            raise ValueError("give text_1 and text_2, or queries and documents")
        if len(queries) not in (1, len(documents)):
            raise ValueError(f"{len(queries)} queries but {len(documents)} documents; give 1 to N or N to N")
        return self

    def ask(self) -> Ask:
        """Return what is asked for: one search for 1 to N, else one for each pair."""
        queries, documents = self._sides()
        raw = self.raw_scores or self.use_activation is False
        if len(queries) == 1:
            return Ask([Search(queries[0], _passages(documents))], raw=raw)
        pairs = enumerate(zip(queries, documents, strict=True))
        return Ask(
            [Search(query, _passages([document]), name=f"queries.{i}") for i, (query, document) in pairs], raw=raw
        )

    def _sides(self) -> tuple[list[str], list[str]]:
        left = next((each for each in (self.text_1, self.queries) if each is not None), [])
        right = next((each for each in (self.text_2, self.documents, self.items) if each is not None), [])
        return [left] if isinstance(left, str) else left, [right] if isinstance(right, str) else right
