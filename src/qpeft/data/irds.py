"""Collections of ir_datasets, by id."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from qpeft.data.passages import ScannedPassages
from qpeft.data.splits import judged, unknown_split
from qpeft.errors import InputError, MissingDependencyError, nearest
from qpeft.types import Passage, Query

_SPLIT_WORDS = ("train", "dev", "validation", "valid", "test", "eval")
_HEAD = 100


class IrdsCollection:
    """A dataset of ir_datasets, which downloads and caches what it needs.

    A split is looked for as the dataset `<id>/<split>`. A dataset with judgements of its own also is a split by
    itself, named by the last part of its id that is a split's name (`beir/scifact/test`: test), else `test`. It goes
    by no other name, so that nobody trains on `…/test` by asking for `train`.
    """

    def __init__(self, dataset_id: str) -> None:
        """Open a dataset; its files are read when asked for.

        Raises:
            MissingDependencyError: ir_datasets is not installed.
            InputError: there is no such dataset, or it has no documents.
        """
        self.dataset_id = dataset_id
        self.name = f"ir_datasets:{dataset_id}"
        self._dataset = _load(dataset_id)
        if not self._dataset.has_docs():
            raise InputError(f"{self.name}: has no documents")

    def __repr__(self) -> str:
        return f"IrdsCollection({self.dataset_id!r})"

    @cached_property
    def passages(self) -> IrdsPassages:
        """The documents, looked up in the store that ir_datasets makes on first use."""
        return IrdsPassages(self.name, self._dataset)

    def splits(self) -> list[str]:
        """Return the splits, as named above, sorted."""
        return sorted(self._split_ids)

    def queries(self, split: str) -> dict[str, Query]:
        """Return the queries that a split judges, in their order; judged queries without a text are left out.

        Raises:
            OptionError: there is no such split.
            InputError: the files cannot be read or downloaded.
        """
        return judged(self._all_queries(split), self.qrels(split))

    def qrels(self, split: str) -> dict[str, dict[str, int]]:
        """Return the judgements of a split; of several grades for one passage (one a subtopic) the highest.

        Raises:
            OptionError: there is no such split.
            InputError: the files cannot be read or downloaded.
        """
        dataset = self._split(split)
        qrels: dict[str, dict[str, int]] = {}
        with _readable(self.name):
            for qrel in dataset.qrels_iter():
                grades = qrels.setdefault(qrel.query_id, {})
                grades[qrel.doc_id] = max(int(qrel.relevance), grades.get(qrel.doc_id, int(qrel.relevance)))
        return qrels

    def fingerprint(self) -> str:
        """Return a SHA-256 over queries and qrels of all splits, the number of documents and the first hundred.

        Of a split whose files cannot be had, it sees that alone: what is asked for may be another one.
        """
        digest = hashlib.sha256()
        head = [(passage.id, passage.title, passage.text) for passage in itertools.islice(self.passages.scan(), _HEAD)]
        parts: list[object] = [self.dataset_id, len(self.passages), head]
        for split in self.splits():
            try:
                queries = [(query.id, query.text, query.answers) for query in self.queries(split).values()]
                parts += [split, queries, self.qrels(split)]
            except InputError:
                parts += [split, None]
        for part in parts:
            digest.update(json.dumps(part).encode())
        return digest.hexdigest()

    def written(self) -> None:
        """Return None: what an id of ir_datasets stands for does not change."""

    @cached_property
    def _split_ids(self) -> dict[str, str]:
        import ir_datasets

        below = f"{self.dataset_id}/"
        ids = {name.removeprefix(below): name for name in ir_datasets.registry if name.startswith(below)}
        ids = {split: name for split, name in ids.items() if _has_judged_queries(ir_datasets.load(name))}
        if _has_judged_queries(self._dataset):
            words = [word for word in self.dataset_id.split("/") if word in _SPLIT_WORDS]
            ids.setdefault(words[-1] if words else "test", self.dataset_id)
        return ids

    def _split(self, split: str) -> Any:
        if split not in self._split_ids:
            raise unknown_split(self.name, split, self.splits())
        return _load(self._split_ids[split])

    def _all_queries(self, split: str) -> dict[str, Query]:
        dataset = self._split(split)
        with _readable(self.name):
            return {query.query_id: _query(query) for query in dataset.queries_iter()}


class IrdsPassages(ScannedPassages):
    """The documents of a dataset as passages."""

    def __init__(self, name: str, dataset: Any) -> None:
        self._name = name
        self._dataset = dataset

    def __getitem__(self, passage_id: str) -> Passage:
        with _readable(self._name):
            return _passage(self._store.get(passage_id))

    def __len__(self) -> int:
        with _readable(self._name):
            count = self._dataset.docs_count()
            if count is None:
                self._store.build()
                count = self._store.count()
            return int(count)

    def scan(self) -> Iterator[Passage]:
        """Yield all documents in their order.

        Raises:
            InputError: the files cannot be read or downloaded.
        """
        with _readable(self._name):
            yield from map(_passage, self._dataset.docs_iter())

    @cached_property
    def _store(self) -> Any:
        return self._dataset.docs_store()


def _passage(doc: Any) -> Passage:
    """Take title and text where a document type has them, else all that ir_datasets calls its text."""
    text = getattr(doc, "text", None)
    if isinstance(text, str):
        return Passage(doc.doc_id, text, getattr(doc, "title", None) or "")
    return Passage(doc.doc_id, doc.default_text())


def _query(query: Any) -> Query:
    text = getattr(query, "text", None)
    return Query(
        query.query_id,
        text if isinstance(text, str) else query.default_text(),
        tuple(getattr(query, "answers", None) or ()),
    )


def _has_judged_queries(dataset: Any) -> bool:
    return bool(dataset.has_queries() and dataset.has_qrels())


def _load(dataset_id: str) -> Any:
    try:
        import ir_datasets
    except ImportError as error:
        raise MissingDependencyError("ir_datasets", "irds") from error
    try:
        return ir_datasets.load(dataset_id)
    except KeyError:
        known = list(ir_datasets.registry)
        family = dataset_id.split("/")[0]
        known = [name for name in known if name.split("/")[0] == family] or [n for n in known if "/" not in n]
        raise InputError(f"ir_datasets has no dataset {dataset_id!r}{nearest(dataset_id, known)}") from None


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Report what ir_datasets raises when a file is missing or cannot be fetched (requests' errors are OSErrors)."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise InputError(f"{name}: ir_datasets could not read or download its files: {error}") from error
