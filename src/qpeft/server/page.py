"""The page at `/`: rankings of BM25, the model alone and its adapters side by side, and what made them.

Models rank through the public API; here are the page's files, the embedded collection's questions, and BM25.
"""

from __future__ import annotations

import contextlib
import functools
from importlib.resources import files
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from qpeft.data.collection import EMBEDDED, Collection, open_collection
from qpeft.errors import InputError, nearest
from qpeft.retrieval.bm25 import BM25
from qpeft.server.dialects.requests import Document, Text
from qpeft.server.refusals import Refusal
from qpeft.server.service import Service
from qpeft.types import Passage
from qpeft.types import Query as Question

KINDS = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
FILES = {
    entry.name: (entry.read_bytes(), KINDS[entry.name.rpartition(".")[2]])
    for entry in files("qpeft.server").joinpath("web").iterdir()
}
HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
OPEN = frozenset({"/", "/page/questions", "/page/candidates", *(f"/page/{name}" for name in FILES)})
"""Need no key: the page has to ask for one, and the embedded collection is no secret."""
COLLECTION = EMBEDDED[0]

router = APIRouter(include_in_schema=False)


class Given(BaseModel):
    """A query and passages, for BM25."""

    query: Text
    documents: Annotated[list[Document], Field(min_length=1)]


@router.get("/")
def page() -> Response:
    """Return the page."""
    return file("index.html")


@router.get("/page/questions")
def questions() -> dict[str, Any]:
    """List the questions of the embedded collection."""
    return {"collection": COLLECTION, "questions": [{"id": id, "text": text} for id, text in _questions().items()]}


@router.get("/page/candidates")
def candidates(question: str, depth: Annotated[int, Query(ge=1, le=100)] = 20) -> dict[str, Any]:
    """Return BM25's candidates for a question of the embedded collection, with the grades of the judged ones."""
    if question not in _questions():
        raise Refusal(404, f"no question {question[:100]!r}{nearest(question[:100], _questions())}", "question")
    collection, index, grades = _embedded()
    (ranking,) = index.retrieve([Question(question, _questions()[question])], depth)
    found = [collection.passages[hit.passage_id] for hit in ranking.hits]
    judged = grades[question]
    return {
        "documents": [{"title": each.title, "text": each.text, "grade": judged.get(each.id, 0)} for each in found],
    }


@router.post("/page/bm25")
def bm25(request: Request, body: Given) -> dict[str, Any]:
    """Rank the passages given by BM25 over nothing but them; those that share no word with the query come last."""
    service: Service = request.app.state.service
    limit = service.settings.max_documents
    if len(body.documents) > limit:
        raise Refusal(413, f"{len(body.documents)} documents; at most {limit} are allowed")
    passages = [Passage(str(index), each.text, each.title) for index, each in enumerate(body.documents)]
    scores = dict.fromkeys(range(len(passages)), 0.0)
    with contextlib.suppress(InputError):  # no passage has a word: all are equal
        (ranking,) = BM25(passages).retrieve([Question("query", body.query)], len(passages))
        scores |= {int(hit.passage_id): hit.score for hit in ranking.hits}
    ordered = sorted(scores, key=lambda place: -scores[place])  # ties keep the order given
    return {"results": [{"index": place, "score": scores[place]} for place in ordered]}


@router.get("/page/{name}")
def file(name: str) -> Response:
    """Return a file of the page."""
    if name not in FILES:
        raise Refusal(404, f"no file {name[:100]!r}")
    content, kind = FILES[name]
    return Response(content, media_type=kind, headers=HEADERS)


@functools.cache
def _embedded() -> tuple[Collection, BM25, dict[str, dict[str, int]]]:
    """Return the embedded collection, its index, and the grades of all splits."""
    collection = open_collection(COLLECTION)
    grades = {query: judged for split in collection.splits() for query, judged in collection.qrels(split).items()}
    return collection, BM25(collection.passages.values()), grades


@functools.cache
def _questions() -> dict[str, str]:
    collection = open_collection(COLLECTION)
    found = {q.id: q.text for split in collection.splits() for q in collection.queries(split).values()}
    return dict(sorted(found.items(), key=lambda item: item[1].lower()))
