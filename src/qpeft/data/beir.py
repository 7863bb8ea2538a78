"""BEIR folders: `corpus.jsonl`, `queries.jsonl`, `qrels/<split>.tsv`; the JSON Lines files also as `.gz`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path

from qpeft.atomic import replacing_folder
from qpeft.data.files import StrPath
from qpeft.data.records import json_lines, write_json_lines
from qpeft.data.splits import judged, unknown_split
from qpeft.data.store import open_passages
from qpeft.data.trec import iter_qrels, read_qrels, write_qrels, write_run
from qpeft.errors import FormatError, InputError, StateError
from qpeft.types import Passage, Qrels, Query, Run

_END = 2**20


class BeirCollection:
    """A BEIR folder.

    Judged passages that the corpus does not have are kept, as in many published sets: leaving them out would raise
    every recall. `convert.info` counts them.
    """

    def __init__(self, folder: StrPath, name: str | None = None) -> None:
        """Open a folder; its files are read when asked for.

        Raises:
            InputError: it is no folder, or has no corpus or no queries.
        """
        self.folder = Path(folder)
        self.name = name or self.folder.absolute().name
        self._corpus = _find(self.folder, "corpus.jsonl")
        self._queries = _find(self.folder, "queries.jsonl")

    def __repr__(self) -> str:
        return f"BeirCollection({str(self.folder)!r})"

    @cached_property
    def passages(self) -> Mapping[str, Passage]:
        """The corpus: in memory if small, else read by offset.

        Raises:
            FormatError: a line is no passage, or its id was there before.
        """
        return open_passages(self._corpus)

    def splits(self) -> list[str]:
        """Return the names of the qrels files, sorted."""
        return sorted(self._qrels)

    @cached_property
    def _qrels(self) -> dict[str, Path]:
        folder = self.folder / "qrels"
        zipped = {path.name.removesuffix(".tsv.gz"): path for path in folder.glob("*.tsv.gz")}
        return zipped | {path.stem: path for path in folder.glob("*.tsv")}

    def queries(self, split: str) -> dict[str, Query]:
        """Return the queries that a split judges, in the order of `queries.jsonl`; all of them where nothing is judged.

        Raises:
            OptionError: there is no such split.
            FormatError: a line of the queries or qrels is malformed.
        """
        return judged(self._all_queries, self.qrels(split)) if self.splits() else dict(self._all_queries)

    def qrels(self, split: str) -> dict[str, dict[str, int]]:
        """Return the judgements of a split.

        Raises:
            OptionError: there is no such split.
            FormatError: a line is malformed, or judges a query that `queries.jsonl` does not have.
        """
        if split not in self.splits():
            raise unknown_split(self.name, split, self.splits())
        path = self._qrels[split]
        qrels = read_qrels(path)
        unknown = qrels.keys() - self._all_queries.keys()
        if unknown:
            first = next(judgement for judgement in iter_qrels(path) if judgement.query_id in unknown)
            raise FormatError(path, first.line, f"query {first.query_id!r} is not in {self._queries.name}")
        return qrels

    def fingerprint(self) -> str:
        """Return a SHA-256 over queries and qrels, and the size and both ends (1 MiB each) of the corpus."""
        digest = hashlib.sha256()
        for path in (self._queries, *sorted(self._qrels.values())):
            content = path.read_bytes()
            digest.update(f"{path.name} {len(content)}\n".encode() + content)
        digest.update(_ends(self._corpus))
        return digest.hexdigest()

    def written(self) -> int:
        """Return when the file of the corpus was last written, in ns since 1970."""
        return self._corpus.stat().st_mtime_ns

    @cached_property
    def _all_queries(self) -> dict[str, Query]:
        queries: dict[str, Query] = {}
        for record in json_lines(self._queries):
            query = record.query()
            if query.id in queries:
                raise record.error(f"query {query.id!r} occurs twice")
            queries[query.id] = query
        return queries


def write_beir(
    folder: StrPath,
    passages: Iterable[Passage],
    queries: Iterable[Query],
    qrels: Mapping[str, Qrels],
    candidates: Run | None = None,
) -> None:
    """Write a BEIR folder, `qrels` by split; it appears whole or not at all.

    A run, if given, goes into it as `candidates.trec`.

    Raises:
        StateError: the folder exists and is not empty.
        InputError: it cannot be made.
        FormatError: an id cannot stand in a qrels file or run.
    """
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise StateError(f"{folder}: exists already; choose another folder, or remove this one")
    with replacing_folder(target) as temporary:
        write_json_lines(map(_passage_fields, passages), temporary / "corpus.jsonl")
        write_json_lines(map(_query_fields, queries), temporary / "queries.jsonl")
        for split, judgements in qrels.items():
            write_qrels(judgements, temporary / "qrels" / f"{split}.tsv")
        if candidates is not None:
            write_run(candidates, temporary / "candidates.trec")


def _passage_fields(passage: Passage) -> dict[str, str]:
    return {"_id": passage.id, "title": passage.title, "text": passage.text}


def _query_fields(query: Query) -> dict[str, str | list[str]]:
    answers: dict[str, str | list[str]] = {"answers": list(query.answers)} if query.answers else {}
    return {"_id": query.id, "text": query.text, **answers}


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise InputError(f"{folder}: no {name} or {name}.gz" if folder.is_dir() else f"{folder}: no such folder")


def _ends(path: Path) -> bytes:
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(_END)
        file.seek(max(len(head), size - _END))
        return f"corpus {size}\n".encode() + head + file.read(_END)
