"""SQuAD 1.1 and 2.0 JSON: paragraphs as passages, the question's own paragraph as the relevant one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from qpeft.data.files import StrPath
from qpeft.data.records import Record, content_id, read_json
from qpeft.errors import FormatError
from qpeft.types import Passage, Query


class SquadData(NamedTuple):
    """What a SQuAD file holds."""

    passages: dict[str, Passage]
    queries: dict[str, Query]
    qrels: dict[str, dict[str, int]]


def read_squad(path: StrPath) -> SquadData:
    """Read a SQuAD file.

    A passage's id is a hash of its title and text, so that the files of one data set share ids. Questions that
    SQuAD 2.0 marks as impossible are left out: no paragraph is relevant to them.

    Raises:
        InputError: the file cannot be opened.
        FormatError: it is not SQuAD JSON, or a question's id occurs twice.
    """
    data = SquadData({}, {}, {})
    for paragraph, title in _paragraphs(path):
        text = paragraph.text("context")
        passage = Passage(content_id(title, text), text, title)
        data.passages[passage.id] = passage
        for question in paragraph.children("qas"):
            if question.fields.get("is_impossible") is True:
                continue
            answers = dict.fromkeys(answer.text("text") for answer in question.children("answers"))
            query = Query(question.id("id"), question.text("question"), tuple(answers))
            if query.id in data.queries:
                raise question.error(f"question {query.id!r} occurs twice")
            data.queries[query.id] = query
            data.qrels[query.id] = {passage.id: 1}
    return data


def _paragraphs(path: StrPath) -> Iterator[tuple[Record, str]]:
    value = read_json(path)
    if not isinstance(value, dict) or "data" not in value:
        raise FormatError(path, None, "not SQuAD: no 'data' at the top")
    for article in Record(value, path).children("data"):
        title = article.text("title", default="").replace("_", " ")
        for paragraph in article.children("paragraphs"):
            yield paragraph, title
