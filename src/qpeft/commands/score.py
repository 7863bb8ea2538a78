"""Score passages for a query and print JSON lines.

Either --query with one or more --passage, or JSON lines on standard input, each with "query" and "passage" (a text,
perhaps with its "title" beside it) or "passages" (a list of texts, or of objects with "text" and "title"). One line
comes out per passage, in the order given, with its score and its rank.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from qpeft import methods
from qpeft.commands._passages import titled_passages
from qpeft.commands._peek import peek_method
from qpeft.data.records import Record, parse_record
from qpeft.errors import OptionError
from qpeft.model_config import ModelConfig
from qpeft.types import Candidates, Passage, Query


@dataclass(frozen=True)
class Config:
    """Scoring."""

    query: str | None = None
    """The query."""
    passage: tuple[str, ...] = ()
    """A passage; may be given several times."""
    title: tuple[str, ...] = ()
    """Titles of the passages, as many as there are passages, or none."""
    method: str | None = None
    """How passages are scored: [methods]; by default as the adapter was trained, else query_likelihood. Its options are
    below, those of another with --method NAME --help."""


def configs(arguments: Sequence[str]) -> tuple[type[Any], ...]:
    """Return this command's options, those of the model and those of the method."""
    return Config, ModelConfig, methods.load(peek_method(arguments)).Config


def run(config: Config, model: ModelConfig, method: Any) -> None:
    """Score and print."""
    if config.query is None and sys.stdin.isatty():
        raise OptionError("give --query and --passage, or JSON lines on standard input")
    if config.query is not None and not config.passage:
        raise OptionError("--query needs at least one --passage")
    if config.query is None and (config.passage or config.title):
        raise OptionError("--passage and --title need a --query")
    passages = titled_passages(config.passage, config.title)
    from qpeft.loading import load_lm

    name = methods.chosen(config.method, getattr(method, "adapter", None))
    reranker = methods.load(name).build(method, load_lm(model))
    items: Iterable[Candidates] = _from_input()
    if config.query is not None:
        items = [Candidates(Query("query", config.query), passages)]
    for candidates in items:
        (ranking,) = reranker.rerank([candidates])
        placed = {int(hit.passage_id): (rank, hit.score) for rank, hit in enumerate(ranking.by_position(), start=1)}
        for index, passage in enumerate(candidates.passages):
            rank, score = placed[index]
            line = {
                "query": candidates.query.text, "index": index, "rank": rank, "score": score, "passage": passage.text,
            }  # fmt: skip
            print(json.dumps(line, ensure_ascii=False), flush=True)


def _from_input() -> Iterator[Candidates]:
    for number, line in enumerate(sys.stdin.buffer, start=1):
        if not line.strip():
            continue
        record = parse_record(line, "standard input", number)
        # The id stands in messages, and says which line is meant.
        query = Query(f"line {number}", record.text("query"))
        given = enumerate(_passages(record))
        yield Candidates(query, tuple(Passage(str(i), p.text("text"), p.text("title", default="")) for i, p in given))


def _passages(record: Record) -> list[Record]:
    if not record.has("passages"):
        return [record.child({"text": record.text("passage"), "title": record.fields.get("title")}, "passage")]
    if record.has("passage"):
        raise record.error("has 'passage' and 'passages'; give one of the two")
    if record.has("title"):
        raise record.error("'title' is for one 'passage'; 'passages' are objects with 'text' and 'title'")
    return [record.described(each, f"passages[{i}]") for i, each in enumerate(record.items("passages"))]
