"""JSON Lines of other rerankers: training groups (FlagEmbedding, Tevatron, plain) and rank_llm requests."""

from __future__ import annotations

from collections.abc import Iterator

from qpeft.data.files import StrPath
from qpeft.data.records import PASSAGE_ID, PASSAGE_TEXT, QUERY_ID, Record, content_id, json_lines
from qpeft.types import Candidates, Group, Passage, Query

_LAYOUTS = {
    "FlagEmbedding": (("pos",), ("neg",)),
    "Tevatron": (("positive_passages",), ("negative_passages",)),
    "plain": (("positives", "positive"), ("negatives", "negative")),
}


def read_groups(path: StrPath) -> list[Group]:
    """Read training groups, one a line; the keys tell the format.

    FlagEmbedding: `query`, `pos`, `neg` (lists of strings). Tevatron: `query_id`, `query`, `positive_passages`,
    `negative_passages` (lists of objects). Plain: `query`, `positive` or `positives`, `negative` or `negatives`. In
    all of them a passage is a string or an object of `text` and perhaps `id` and `title`, and negatives may be
    missing. What has no id gets a hash of its content.

    Raises:
        InputError: the file cannot be opened.
        FormatError: a line has no query or no positive, the keys of no format or of two, or those of another format
            than the lines above.
    """
    groups = []
    layout = ""
    for record in json_lines(path):
        found = _layout(record)
        layout = layout or found
        if found != layout:
            raise record.error(f"a {found} line, but the lines above are {layout}")
        positive, negative = _LAYOUTS[layout]
        positives = _passages(record, positive)
        if not positives:
            raise record.error("no positive")
        groups.append(Group(_query(record), positives, _passages(record, negative)))
    return groups


def read_requests(path: StrPath) -> Iterator[Candidates]:
    """Yield the requests of rank_llm: `query` {text, qid} and `candidates` [{docid, score, doc}].

    `doc` is a string or an object whose text is called `text`, `contents`, `segment`, `body`, `content` or `passage`.

    Raises:
        InputError: the file cannot be opened.
        FormatError: a line is no request, a passage occurs twice in it, or only some passages have a score.
    """
    for record in json_lines(path):
        asked = record.child(record.get("query"), "query")
        query = Query(asked.id("qid", *QUERY_ID), asked.text("text"))
        requested = record.children("candidates")
        yield record.candidates(query, [_requested(each) for each in requested], requested)


def _layout(record: Record) -> str:
    found = [layout for layout, (positive, _) in _LAYOUTS.items() if record.has(*positive)]
    if len(found) != 1:
        keys = ", ".join(" or ".join(repr(name) for name in positive) for positive, _ in _LAYOUTS.values())
        raise record.error(f"{'several' if found else 'none'} of the keys that tell the format: {keys}")
    return found[0]


def _query(record: Record) -> Query:
    if isinstance(record.get("query"), dict):
        record = record.child(record.get("query"), "query")
    text = record.text("query", "text")
    return Query(record.id(*QUERY_ID, default=content_id("", text)), text, record.strings("answers"))


def _passages(record: Record, names: tuple[str, ...]) -> tuple[Passage, ...]:
    given = [record.described(value, f"{names[0]}[{i}]") for i, value in enumerate(record.items(*names))]
    return tuple(each.passage(hashed=True) for each in given)


def _requested(candidate: Record) -> Passage:
    child = candidate.described(candidate.get("doc"), "doc")
    text = child.text(*PASSAGE_TEXT, "segment", "body", "content", "passage")
    return Passage(candidate.id("docid", *PASSAGE_ID), text, child.text("title", default=""))
