"""Collections: passages, queries and judgements under one name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from qpeft.data.beir import BeirCollection
from qpeft.data.irds import IrdsCollection
from qpeft.errors import InputError
from qpeft.types import Passage, Query

EMBEDDED = ("mini",)
_EMBEDDED_FOLDER = Path(__file__).parents[1] / "collections"
_IRDS = "ir_datasets:"


class Collection(Protocol):
    """What every collection offers; files are read when asked for."""

    name: str

    @property
    def passages(self) -> Mapping[str, Passage]:
        """All passages by id."""
        ...

    def splits(self) -> list[str]:
        """Return the splits that have judgements, sorted."""
        ...

    def queries(self, split: str) -> dict[str, Query]:
        """Return exactly the queries that a split judges, in the order of the collection.

        Raises:
            OptionError: there is no such split.
        """
        ...

    def qrels(self, split: str) -> dict[str, dict[str, int]]:
        """Return the judgements of a split: query id → passage id → grade.

        Raises:
            OptionError: there is no such split.
        """
        ...

    def fingerprint(self) -> str:
        """Return a hash of the content, the same wherever the collection is stored.

        Of a large corpus, it sees no more than the size and the ends.
        """
        ...

    def written(self) -> int | None:
        """Return when the corpus was last written, in ns since 1970, or None if it never changes.

        Belongs into what says what an index was made from, as the fingerprint misses some changes; but not into
        provenance, as a copy has another time.
        """
        ...


def identity(collection: Collection, split: str) -> dict[str, str]:
    """Return what provenance says of a collection."""
    return {"name": collection.name, "split": split, "fingerprint": collection.fingerprint()}


def open_collection(name: str) -> Collection:
    """Open a BEIR folder, the embedded `mini`, or `ir_datasets:<id>`.

    A folder of your own that is called `mini` is meant by `./mini`.

    Raises:
        InputError: there is no such collection, or a file of it is missing.
        MissingDependencyError: it needs ir_datasets, which is not installed.
    """
    if name in EMBEDDED:
        return BeirCollection(_EMBEDDED_FOLDER / name, name)
    if name.startswith(_IRDS):
        return IrdsCollection(name.removeprefix(_IRDS))
    if not Path(name).is_dir():
        raise InputError(f"no collection {name!r}: it is neither a folder, nor 'mini', nor 'ir_datasets:<id>'")
    return BeirCollection(name)
