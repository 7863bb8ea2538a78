"""JSON objects that know where they stand, so that what is wrong with them is said by file and line."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qpeft.data.files import StrPath, numbered_lines, open_text, write_text
from qpeft.errors import FormatError
from qpeft.types import Candidates, Passage, Query, whole

PASSAGE_ID = ("_id", "id", "docid", "doc_id", "passage_id", "psg_id")
QUERY_ID = ("_id", "id", "query_id", "qid")
PASSAGE_TEXT = ("text", "contents")


@dataclass(frozen=True, slots=True)
class Record:
    """A JSON object of a file; `place` narrows down where, if the line does not."""

    fields: dict[str, Any]
    path: StrPath
    line: int | None = None
    place: str = ""

    def error(self, message: str) -> FormatError:
        """Return an error that says where this object stands."""
        return FormatError(self.path, self.line, f"{self.place}: {message}" if self.place else message)

    def has(self, *names: str) -> bool:
        """Whether one of the names is there and not null."""
        return any(self.fields.get(name) is not None for name in names)

    def get(self, *names: str) -> Any:
        """Return the value of the first name that is there and not null.

        Raises:
            FormatError: none of them is.
        """
        for name in names:
            if self.fields.get(name) is not None:
                return self.fields[name]
        raise self.error(f"no {' or '.join(repr(name) for name in names)}")

    def text(self, *names: str, default: str | None = None) -> str:
        """Return a string, made whole, or the default.

        Raises:
            FormatError: it is missing and there is no default, or it is no string.
        """
        if default is not None and not self.has(*names):
            return default
        value = self.get(*names)
        if not isinstance(value, str):
            raise self.error(f"{names[0]!r} is {value!r:.60}, not a string")
        return whole(value)

    def id(self, *names: str, default: str | None = None) -> str:
        """Return an id: a string, or an integer written as one.

        Raises:
            FormatError: it is missing and there is no default, or it is empty or of another kind, or no file could hold
                it. It is not made whole as a text is, since two ids could become one.
        """
        value = self.get(*names) if default is None or self.has(*names) else default
        if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
            raise self.error(f"the id is {value!r:.60}, not a string or an integer")
        found = str(value)
        if whole(found) != found:
            raise self.error(f"the id {found!r:.60} has half a character (a lone surrogate)")
        return found

    def items(self, *names: str) -> list[Any]:
        """Return a list, empty if missing; a lone string or object is a list of one.

        Raises:
            FormatError: it is something else.
        """
        if not self.has(*names):
            return []
        value = self.get(*names)
        if isinstance(value, str | dict):
            return [value]
        if not isinstance(value, list):
            raise self.error(f"{names[0]!r} is {value!r:.60}, not a list")
        return value

    def child(self, value: Any, place: str) -> Record:
        """Return an object that stands inside this one.

        Raises:
            FormatError: it is no object.
        """
        place = f"{self.place}, {place}" if self.place else place
        if not isinstance(value, dict):
            raise FormatError(self.path, self.line, f"{place}: {value!r:.60} is not a JSON object")
        return Record(value, self.path, self.line, place)

    def described(self, value: Any, place: str) -> Record:
        """Return an object that stands inside this one; a lone string stands for one with that `text`.

        Raises:
            FormatError: it is neither.
        """
        return self.child({"text": value} if isinstance(value, str) else value, place)

    def children(self, *names: str) -> list[Record]:
        """Return the objects of a list, empty if missing.

        Raises:
            FormatError: it is no list, or an entry is no object.
        """
        return [self.child(value, f"{names[0]}[{i}]") for i, value in enumerate(self.items(*names))]

    def strings(self, *names: str) -> tuple[str, ...]:
        """Return a list of strings, made whole, empty if missing.

        Raises:
            FormatError: it is no list, or an entry is no string.
        """
        values = self.items(*names)
        for value in values:
            if not isinstance(value, str):
                raise self.error(f"{names[0]!r} holds {value!r:.60}, not a string")
        return tuple(map(whole, values))

    def score(self, *, quoted: bool = False) -> float:
        """Read the field `score`, a number.

        Args:
            quoted: it may stand in quotes, as in DPR's files.

        Raises:
            FormatError: it is missing, or no finite number.
        """
        value = self.get("score")
        wrong = isinstance(value, bool) or (isinstance(value, str) and not quoted)
        try:
            score = math.nan if wrong else float(value)
        except (TypeError, ValueError, OverflowError):
            score = math.nan
        if not math.isfinite(score):
            raise self.error(f"score {value!r:.60} is not a finite number")
        return score

    def passage(self, ids: Sequence[str] = PASSAGE_ID, *, hashed: bool = False) -> Passage:
        """Read a passage: an id, a text, perhaps a title.

        Args:
            ids: names of the id; the first that is there counts.
            hashed: a passage without an id gets a hash of its content.

        Raises:
            FormatError: a part is missing or of the wrong kind.
        """
        text, title = self.text(*PASSAGE_TEXT), self.text("title", default="")
        return Passage(self.id(*ids, default=content_id(title, text) if hashed else None), text, title)

    def query(self) -> Query:
        """Read a query: an id, a text, perhaps answers.

        Raises:
            FormatError: a part is missing or of the wrong kind.
        """
        return Query(self.id(*QUERY_ID), self.text("text"), self.strings("answers"))

    def candidates(
        self, query: Query, passages: Sequence[Passage], found: Sequence[Record], *, quoted: bool = False
    ) -> Candidates:
        """Return the candidates of this object's query.

        Args:
            query: this object's.
            passages: those of `found`.
            found: objects inside this one, which may have scores.
            quoted: scores may stand in quotes.

        Raises:
            FormatError: a passage occurs twice, a score is no finite number, or only some have one.
        """
        if len({passage.id for passage in passages}) < len(passages):
            raise self.error("a passage occurs twice")
        scores = tuple(each.score(quoted=quoted) for each in self.all_or_none(found, "score"))
        return Candidates(query, tuple(passages), scores)

    def all_or_none(self, passages: Sequence[Record], name: str) -> Sequence[Record]:
        """Return the passages of this object if they have a field, nothing if they have not.

        Raises:
            FormatError: only some of them have it.
        """
        having = [each for each in passages if each.has(name)]
        if having and len(having) < len(passages):
            raise self.error(f"{len(having)} of {len(passages)} passages have a {name!r}")
        return having


def json_lines(path: StrPath) -> Iterator[Record]:
    """Yield the objects of a JSON Lines file; blank lines are skipped.

    Raises:
        InputError: the file cannot be opened.
        FormatError: a line is not a JSON object.
    """
    for number, line in numbered_lines(path):
        yield parse_record(line, path, number)


def write_json_lines(values: Iterable[Mapping[str, Any]], path: StrPath) -> None:
    """Write one object a line.

    Raises:
        InputError: the file cannot be made.
    """
    with write_text(path) as file:
        for value in values:
            file.write(json.dumps(value, ensure_ascii=False) + "\n")


def parse_record(line: str | bytes, path: StrPath, number: int | None) -> Record:
    """Parse one line.

    Raises:
        FormatError: it is not a JSON object.
    """
    value = _parse(line, path, number)
    if not isinstance(value, dict):
        raise FormatError(path, number, f"{value!r:.60} is not a JSON object")
    return Record(value, path, number)


def read_json(path: StrPath) -> Any:
    """Read a file that is one JSON value.

    Raises:
        InputError: the file cannot be opened.
        FormatError: it is not JSON.
    """
    with open_text(path) as file:
        text = file.read()
    return _parse(text, path, None)


def write_json(path: StrPath, value: Any) -> None:
    """Write a file that is one JSON value, over several lines.

    Raises:
        InputError: the file cannot be made.
    """
    with write_text(path) as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _parse(text: str | bytes, path: StrPath, number: int | None) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise FormatError(path, number or error.lineno, f"not JSON: {error.msg}, column {error.colno}") from error
    except UnicodeDecodeError as error:
        raise FormatError(path, number, f"not UTF-8: {error.reason}") from error
    except RecursionError as error:
        raise FormatError(path, number, "JSON that is nested too deep") from error
    except ValueError as error:  # of Python's own bound on the digits of an integer
        raise FormatError(path, number, "JSON with an integer of too many digits") from error


def content_id(title: str, text: str) -> str:
    """Return an id for what came without one: equal content gets an equal id, in every file."""
    return hashlib.sha256(f"{title}\n{text}".encode()).hexdigest()[:16]
