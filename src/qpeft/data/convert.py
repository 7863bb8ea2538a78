"""Any format that can be read, as a BEIR folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

from qpeft.atomic import is_stream
from qpeft.data.beir import write_beir
from qpeft.data.collection import open_collection
from qpeft.data.dpr import LabelledCandidates, read_dpr_training, read_evidence, read_retrieved, retrieved_ids
from qpeft.data.files import StrPath
from qpeft.data.jsonl import read_groups, read_requests
from qpeft.data.squad import read_squad
from qpeft.errors import InputError, OptionError, nearest
from qpeft.types import Candidates, Group, Passage, Qrels, Query, Ranking, Run

_Item = TypeVar("_Item", Passage, Query)


@dataclass(frozen=True, slots=True)
class Contents:
    """What goes into a BEIR folder."""

    passages: Iterable[Passage]
    queries: Iterable[Query] = ()
    qrels: Mapping[str, Qrels] = field(default_factory=dict)
    candidates: Run | None = None


def convert(
    source: str, target: StrPath, format: str, *, split: str | None = None, evidence: StrPath | None = None
) -> None:
    """Write a BEIR folder, with a run `candidates.trec` in it where the source holds candidates.

    Candidates without scores are given 1, 1/2, 1/3 … in their order. A group's positives get grade 1 and its
    negatives 0; retrieved passages get their labels.

    Args:
        source: a file; for `collection`, whatever `open_collection` takes.
        target: the folder to make.
        format: one of `FORMATS`.
        split: name of the qrels; `train` for training formats and `test` for others by default. A collection keeps
            its own splits, or only this one, and the queries that they judge.
        evidence: DPR's evidence TSV, for retrieved lists without texts.

    Raises:
        OptionError: an unknown format, or evidence for one that does not take it, or for a pipe.
        StateError: the folder exists and is not empty.
        InputError: the source cannot be read; its subclass FormatError says where.
    """
    if format not in FORMATS:
        raise OptionError(f"unknown format {format!r}{nearest(format, FORMATS)}")
    if evidence is not None and format != "dpr":
        raise OptionError(f"evidence belongs to the format 'dpr', not to {format!r}")
    if evidence is not None and is_stream(source):
        raise OptionError(f"{source} is a pipe; with evidence, lists are read twice, so they must be a file")
    contents = FORMATS[format](source, split, evidence)
    write_beir(target, contents.passages, contents.queries, contents.qrels, contents.candidates)


def _from_collection(source: str, split: str | None, evidence: StrPath | None) -> Contents:
    collection = open_collection(source)
    known = collection.splits()
    # Where nothing is judged, any split has all queries.
    splits = [split] if split is not None else known or ["test"]
    queries = {query.id: query for name in splits for query in collection.queries(name).values()}
    qrels = {name: collection.qrels(name) for name in splits if name in known}
    return Contents(collection.passages.values(), queries.values(), qrels)


def _from_squad(source: str, split: str | None, evidence: StrPath | None) -> Contents:
    data = read_squad(source)
    return Contents(data.passages.values(), data.queries.values(), {split or "test": data.qrels})


def _from_groups(groups: list[Group], source: str, split: str | None) -> Contents:
    qrels: dict[str, dict[str, int]] = {}
    for group in groups:
        grades = qrels.setdefault(group.query.id, {})
        for passage in group.negatives:
            grades.setdefault(passage.id, 0)
        grades.update(dict.fromkeys((passage.id for passage in group.positives), 1))
    passages = _unique(source, (passage for group in groups for passage in group.positives + group.negatives))
    return Contents(passages, _unique(source, (group.query for group in groups)), {split or "train": qrels})


def _from_dpr(source: str, split: str | None, evidence: StrPath | None) -> Contents:
    known: dict[str, Passage] = {}
    if evidence is not None:
        # Only what is needed: the whole evidence, 21 million passages, would fill the memory.
        wanted = retrieved_ids(source)
        known = {passage.id: passage for passage in read_evidence(evidence) if passage.id in wanted}
    labelled = read_retrieved(source, known)
    contents = _from_candidates([item.candidates for item in labelled], source)
    grades = {item.candidates.query.id: _grades(item) for item in labelled if item.labels}
    return replace(contents, qrels={split or "test": grades} if grades else {})


def _grades(item: LabelledCandidates) -> dict[str, int]:
    return {passage.id: int(label) for passage, label in zip(item.candidates.passages, item.labels, strict=True)}


def _from_candidates(candidates: list[Candidates], source: str) -> Contents:
    return Contents(
        passages=_unique(source, (passage for item in candidates for passage in item.passages)),
        queries=_unique(source, (item.query for item in candidates)),
        candidates=Run(map(_ranking, candidates), "candidates"),
    )


def _ranking(item: Candidates) -> Ranking:
    scores = item.scores or [1 / rank for rank in range(1, len(item.passages) + 1)]
    return Ranking.from_scores(item.query.id, zip((passage.id for passage in item.passages), scores, strict=True))


def _unique(source: str, items: Iterable[_Item]) -> list[_Item]:
    """Drop repetitions; the same id for different content is an error."""
    known: dict[str, _Item] = {}
    for item in items:
        if known.setdefault(item.id, item) != item:
            raise InputError(
                f"{source}: the id {item.id!r} stands for two different {type(item).__name__.lower()} texts"
            )
    return list(known.values())


FORMATS: dict[str, Callable[[str, str | None, StrPath | None], Contents]] = {
    "collection": _from_collection,
    "squad": _from_squad,
    "dpr": _from_dpr,
    "evidence": lambda source, split, evidence: Contents(read_evidence(source)),
    "dpr-training": lambda source, split, _: _from_groups(read_dpr_training(source), source, split),
    "groups": lambda source, split, _: _from_groups(read_groups(source), source, split),
    "requests": lambda source, split, _: _from_candidates(list(read_requests(source)), source),
}
