"""Passages by id: in memory, or as a mapping that is walked through in one pass."""

from __future__ import annotations

import abc
from collections.abc import ItemsView, Iterator, Mapping, ValuesView

from qpeft.data.files import StrPath
from qpeft.data.records import json_lines
from qpeft.types import Passage


class ScannedPassages(Mapping[str, Passage], abc.ABC):
    """A mapping too large for memory: `values()` and `items()` read it once through, not passage by passage."""

    @abc.abstractmethod
    def scan(self) -> Iterator[Passage]:
        """Yield all passages in their original order."""

    def __iter__(self) -> Iterator[str]:
        return (passage.id for passage in self.scan())

    def values(self) -> ValuesView[Passage]:
        """Return a view of the passages."""
        return _Values(self)

    def items(self) -> ItemsView[str, Passage]:
        """Return a view of (id, passage)."""
        return _Items(self)


class _Values(ValuesView[Passage]):
    def __init__(self, passages: ScannedPassages) -> None:
        super().__init__(passages)
        self._scan = passages.scan

    def __iter__(self) -> Iterator[Passage]:
        return self._scan()


class _Items(ItemsView[str, Passage]):
    def __init__(self, passages: ScannedPassages) -> None:
        super().__init__(passages)
        self._scan = passages.scan

    def __iter__(self) -> Iterator[tuple[str, Passage]]:
        return ((passage.id, passage) for passage in self._scan())


def read_passages(path: StrPath) -> dict[str, Passage]:
    """Read a JSON Lines corpus into memory: `_id` (or `id`, `docid`), `text` (or `contents`), `title` if it has one.

    Raises:
        InputError: the file cannot be opened.
        FormatError: a line is no passage, or its id was there before.
    """
    passages: dict[str, Passage] = {}
    for record in json_lines(path):
        passage = record.passage()
        if passage.id in passages:
            raise record.error(f"passage {passage.id!r} occurs twice")
        passages[passage.id] = passage
    return passages
