"""TREC run files and relevance judgements (qrels)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qpeft.data.files import StrPath, numbered_lines, write_text
from qpeft.errors import FormatError, InputError
from qpeft.types import Qrels, Ranking, Run

# From this magnitude on, rounding to float32 gives infinity.
_FLOAT32_LIMIT = 2.0**128 - 2.0**103
_BLANKS = re.compile(r"[ \t]+")
_GRADE = re.compile(r"[+-]?\d{1,18}")  # what 64 bits hold, as evaluators do


def read_run(path: StrPath) -> Run:
    """Read a TREC run: `query Q0 passage rank score tag`, separated by tabs or spaces.

    Ranks are ignored: passages are sorted by `Ranking.from_scores`. Queries keep the order of the file; the tag is
    that of the first line, or the file's name if there is none.

    Raises:
        InputError: the file cannot be opened.
        FormatError: a line without six columns, a score that is no finite float32, or a passage that a query
            already has.
    """
    tag = ""
    scores: dict[str, dict[str, float]] = {}
    for number, line in numbered_lines(path):
        columns = _columns(line)
        if len(columns) != 6:
            raise FormatError(path, number, f"{len(columns)} columns, but a run has 6: query Q0 passage rank score tag")
        query_id, _, passage_id, _, score, line_tag = columns
        tag = tag or line_tag
        ranking = scores.setdefault(query_id, {})
        if passage_id in ranking:
            raise FormatError(path, number, f"query {query_id!r} has passage {passage_id!r} twice")
        ranking[passage_id] = _score(score, path, number)
    rankings = [Ranking.from_scores(query_id, ranking.items()) for query_id, ranking in scores.items()]
    return Run(rankings, tag or Path(path).name)


def write_run(run: Run, path: StrPath) -> None:
    """Write a TREC run, separated by spaces, ranks from 1.

    Scores are written with as many digits as it takes to read the same float32 back, and no more.

    Raises:
        InputError: the file cannot be made, or an id or the tag is empty or holds white space, so that the line could
            not be read back.
    """
    with write_text(path) as file:
        for query_id, ranking in run.items():
            for rank, hit in enumerate(ranking.hits, start=1):
                _check_words(query_id, hit.passage_id, run.tag)
                file.write(f"{query_id} Q0 {hit.passage_id} {rank} {np.float32(hit.score)!s} {run.tag}\n")


def check_ids(ranking: Ranking) -> None:
    """Raise the error that writing a ranking would end in, so that it shows before all are made.

    Raises:
        InputError: an id is empty or holds white space.
    """
    _check_words(ranking.query_id, *(hit.passage_id for hit in ranking.hits))


class Judgement(NamedTuple):
    """A line of a qrels file."""

    line: int
    query_id: str
    passage_id: str
    grade: int


def read_qrels(path: StrPath) -> dict[str, dict[str, int]]:
    """Read relevance judgements: TREC's `query 0 passage grade`, or BEIR's `query passage grade` under a header.

    Which of the two is seen from the first line. A judgement may be repeated, but not contradicted.

    Raises:
        InputError: the file cannot be opened.
        FormatError: a wrong number of columns, a grade that is no integer, or two grades for one passage.
    """
    qrels: dict[str, dict[str, int]] = {}
    for line, query_id, passage_id, grade in iter_qrels(path):
        known = qrels.setdefault(query_id, {}).setdefault(passage_id, grade)
        if known != grade:
            raise FormatError(
                path, line, f"query {query_id!r}, passage {passage_id!r}: grade {grade}, but {known} before"
            )
    return qrels


def iter_qrels(path: StrPath) -> Iterator[Judgement]:
    """Yield the judgements of a file with their lines; for formats and errors see `read_qrels`."""
    width, tabs = 0, False
    for number, line in numbered_lines(path):
        columns = [column.strip(" ") for column in line.split("\t")] if tabs else _columns(line)
        if not width:
            tabs = len(columns) == 3 and line.count("\t") == 2  # BEIR's, where an id may hold blanks
            if len(columns) not in (3, 4):
                raise FormatError(
                    path, number, f"{len(columns)} columns, but qrels have 4 (query 0 passage grade) or 3 (BEIR)"
                )
            width = len(columns)
            if width == 3 and not any(map(str.isdecimal, columns[2])):
                continue
        if len(columns) != width:
            raise FormatError(path, number, f"{len(columns)} columns, but {width} in the lines above")
        if not _GRADE.fullmatch(columns[-1]):
            raise FormatError(path, number, f"grade {columns[-1]!r:.60} is not an integer of at most 18 digits")
        yield Judgement(number, columns[0], columns[-2], int(columns[-1]))


def write_qrels(qrels: Qrels, path: StrPath) -> None:
    """Write relevance judgements with BEIR's three columns under a header.

    Raises:
        InputError: the file cannot be made, or an id is empty or holds white space, so that the line could not be read
            back.
    """
    with write_text(path) as file:
        file.write("query-id\tcorpus-id\tscore\n")
        for query_id, grades in qrels.items():
            for passage_id, grade in grades.items():
                _check_words(query_id, passage_id)
                file.write(f"{query_id}\t{passage_id}\t{grade}\n")


def fits_column(word: str) -> bool:
    """Return whether a word can stand in a column: it is not empty and holds no blank of ASCII's."""
    return bool(word) and not any(blank in word for blank in " \t\r\n\v\f")


def _columns(line: str) -> list[str]:
    # Not str.split(): an id may hold a no-break space, which trec_eval takes for a letter.
    return _BLANKS.split(line.strip(" \t"))


def _score(text: str, path: StrPath, number: int) -> float:
    try:
        score = float(text)
    except ValueError:
        raise FormatError(path, number, f"score {text!r} is not a number") from None
    if not abs(score) < _FLOAT32_LIMIT:
        raise FormatError(path, number, f"score {text} cannot be ranked")
    return score


def _check_words(*words: str) -> None:
    for word in words:
        if not fits_column(word):
            raise InputError(f"the id {word!r} cannot stand in a run or in qrels: it is empty or holds white space")
