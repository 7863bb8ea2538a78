"""JSON of DPR and of those who follow it (UPR, Q-PEFT): retrieved lists, training files, the evidence TSV."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from qpeft.data.files import StrPath, open_text
from qpeft.data.records import PASSAGE_ID, PASSAGE_TEXT, QUERY_ID, Record, read_json
from qpeft.errors import FormatError
from qpeft.types import Candidates, Group, Passage, Query

_TRAINING_ID = ("passage_id", "psg_id", "id")
_WRAPPER = re.compile(r"^\s*\[CLS\]\s*|\s*\[SEP\].*$", re.DOTALL)


@dataclass(frozen=True, slots=True)
class LabelledCandidates:
    """Candidates, and for each passage whether it has an answer; `labels` is empty where the file does not say."""

    candidates: Candidates
    labels: tuple[bool, ...] = ()


def read_retrieved(path: StrPath, evidence: Mapping[str, Passage] | None = None) -> list[LabelledCandidates]:
    """Read a retriever's results: `question`, `answers`, and `ctxs` (or `contexts`) in the order retrieved.

    The file is a list of such objects, or an object of them, whose keys then are the query ids; in a list, a question
    without an id gets its position, from 0. `[CLS] … [SEP]` around a question is removed.

    Args:
        path: the file.
        evidence: passages by id, for files that give only the ids (UPR's).

    Raises:
        InputError: the file cannot be opened.
        FormatError: it is not such JSON, a passage occurs twice for a question, a passage is neither here nor in the
            evidence, or only some of a question's passages have a score or a label.
    """
    return [_retrieved(record, query_id, evidence or {}) for query_id, record in _questions(path)]


def retrieved_ids(path: StrPath) -> set[str]:
    """Return the ids of all passages in a retriever's results: the part of the evidence that they need.

    Raises:
        InputError: the file cannot be opened.
        FormatError: it is not such JSON.
    """
    return {
        context.id(*PASSAGE_ID) for _, record in _questions(path) for context in record.children("ctxs", "contexts")
    }


def read_dpr_training(path: StrPath) -> list[Group]:
    """Read DPR's training JSON: `positive_ctxs`, and as negatives `hard_negative_ctxs`, then `negative_ctxs`.

    Questions without a positive passage are left out, as in DPR. A passage without an id gets a hash of its content.

    Raises:
        InputError: the file cannot be opened.
        FormatError: it is not such JSON.
    """
    groups = []
    for query_id, record in _questions(path):
        positives, hard, others = (
            tuple(child.passage(_TRAINING_ID, hashed=True) for child in record.children(name))
            for name in ("positive_ctxs", "hard_negative_ctxs", "negative_ctxs")
        )
        if positives:
            groups.append(Group(_query(record, query_id), positives, hard + others))
    return groups


def read_evidence(path: StrPath) -> Iterator[Passage]:
    """Yield the passages of an evidence file: tab-separated `id text title` under a header, quoted as in CSV.

    Raises:
        InputError: the file cannot be opened.
        FormatError: a column is missing or too much, or the quoting is broken.
    """
    csv.field_size_limit(1 << 30)  # by default a text of 128 KiB is taken for a quote that is not closed
    with open_text(path) as file:
        rows = csv.reader(file, delimiter="\t", strict=True)
        try:
            header = next(rows, [])
            if sorted(header) != ["id", "text", "title"]:
                raise FormatError(path, 1, f"the header is {header!r:.80}, not id, text and title")
            place = {name: header.index(name) for name in header}
            for row in filter(None, rows):
                if len(row) != 3:
                    raise FormatError(path, rows.line_num, f"{len(row)} columns, but 3 in the header")
                yield Passage(row[place["id"]], row[place["text"]], row[place["title"]])
        except csv.Error as error:
            raise FormatError(path, rows.line_num, f"broken quoting: {error}") from error


def _questions(path: StrPath) -> Iterator[tuple[str, Record]]:
    value = read_json(path)
    if not isinstance(value, list | dict):
        raise FormatError(path, None, "neither a list nor an object of questions")
    keyed = value.items() if isinstance(value, dict) else enumerate(value)
    top = Record({}, path)
    for key, fields in keyed:
        record = top.child(fields, f"question {key}")
        yield record.id(*QUERY_ID, default=str(key)), record


def _query(record: Record, query_id: str) -> Query:
    return Query(query_id, _WRAPPER.sub("", record.text("question")).strip(), record.strings("answers"))


def _retrieved(record: Record, query_id: str, evidence: Mapping[str, Passage]) -> LabelledCandidates:
    if not record.has("ctxs", "contexts"):
        raise record.error("no 'ctxs' or 'contexts'")
    contexts = record.children("ctxs", "contexts")
    passages = [_passage(context, evidence) for context in contexts]
    candidates = record.candidates(_query(record, query_id), passages, contexts, quoted=True)
    return LabelledCandidates(candidates, tuple(map(_label, record.all_or_none(contexts, "has_answer"))))


def _passage(context: Record, evidence: Mapping[str, Passage]) -> Passage:
    if context.has(*PASSAGE_TEXT):
        return context.passage()
    passage = evidence.get(context.id(*PASSAGE_ID))
    if passage is None:
        raise context.error(f"passage {context.id(*PASSAGE_ID)!r} has no text here and is not in the evidence")
    return passage


def _label(context: Record) -> bool:
    label = context.get("has_answer")
    if not isinstance(label, bool):
        raise context.error(f"'has_answer' is {label!r:.60}, not true or false")
    return label
