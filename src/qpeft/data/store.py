"""Passages of a JSON Lines corpus, read from disk one at a time.

The index is an array of 16 bytes a passage, memory-mapped from `cache_folder`: keys, sorted, and where each passage
starts in the file. A key is the CRC-32 of the id in its upper half and the length of the line in its lower half. Ids
with one CRC stand next to each other, and the right one is told by reading it.
"""

from __future__ import annotations

import os
import shutil
import weakref
import zlib
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from qpeft.atomic import replacing
from qpeft.data.cache import cache_folder
from qpeft.data.files import StrPath, open_binary
from qpeft.data.passages import ScannedPassages, read_passages
from qpeft.data.records import parse_record
from qpeft.errors import FormatError, InputError
from qpeft.types import Passage

_HALF = 32
_IN_MEMORY = 16 * 2**20

Index = NDArray[np.uint64]  # [2, 1 + passages]; column 0 is the stamp of the corpus


def open_passages(path: StrPath) -> Mapping[str, Passage]:
    """Open a JSON Lines corpus: in memory up to 16 MiB, by offset beyond.

    Raises:
        InputError: the file cannot be opened.
        FormatError: a line is no passage, or its id was there before.
    """
    return read_passages(path) if _stamp(Path(path))[0] <= _IN_MEMORY else PassageStore(path)


class PassageStore(ScannedPassages):
    """Passages by id, read from a JSON Lines file when asked for; iteration is in file order.

    The first opening indexes the file, and again whenever its size or time has changed. A gzip corpus is unpacked
    beside the index. Threads may share a store; pickled, it is opened anew.
    """

    def __init__(self, path: StrPath) -> None:
        """Open a corpus, indexing it if need be.

        Raises:
            InputError: the corpus cannot be opened, or the index not be written.
            FormatError: a line is no passage, or its id was there before.
        """
        self.path = Path(path)
        stamp = _stamp(self.path)
        folder = cache_folder(self.path)
        packed = self.path.suffix == ".gz"
        self._plain = folder / self.path.stem if packed else self.path
        index_path = folder / f"{self.path.name}.index-1.npy"
        index = _load_index(index_path, stamp) if self._plain.exists() else None
        if index is None:
            if packed:
                _unpack(self.path, self._plain)
            _build_index(self.path, self._plain, stamp, index_path)
            index = _load_index(index_path, stamp)
        if index is None or _stamp(self.path) != stamp:
            raise InputError(f"{self.path}: changed while it was being indexed")
        self._keys, self._offsets = index[:, 1:]
        self._descriptor = os.open(self._plain, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def __getitem__(self, passage_id: str) -> Passage:
        key = _crc(passage_id) << _HALF
        place = int(np.searchsorted(self._keys, np.uint64(key)))
        while place < len(self._keys) and int(self._keys[place]) >> _HALF == key >> _HALF:
            passage = self._read(int(self._offsets[place]), int(self._keys[place]) & (2**_HALF - 1))
            if passage.id == passage_id:
                return passage
            place += 1
        raise KeyError(passage_id)

    def __len__(self) -> int:
        return len(self._keys)

    def __repr__(self) -> str:
        return f"PassageStore({str(self.path)!r}, {len(self)} passages)"

    def __reduce__(self) -> tuple[type[PassageStore], tuple[Path]]:
        return PassageStore, (self.path,)

    def scan(self) -> Iterator[Passage]:
        """Yield all passages in file order, each parsed once."""
        for number, _, line in _lines(self._plain):
            yield parse_record(line, self.path, number).passage()

    def _read(self, offset: int, length: int) -> Passage:
        line = os.pread(self._descriptor, length, offset)
        try:
            return parse_record(line, self.path, None).passage()
        except FormatError as error:
            raise FormatError(self.path, None, "the file has changed since it was opened") from error


def _crc(passage_id: str) -> int:
    return zlib.crc32(passage_id.encode())


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    return status.st_size, status.st_mtime_ns


def _lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    offset = 0
    with open_binary(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, offset, line
            offset += len(line)


def _unpack(source: Path, target: Path) -> None:
    with replacing(target) as temporary, open_binary(source) as packed, open(temporary, "wb") as plain:
        shutil.copyfileobj(packed, plain, 2**20)


def _load_index(path: Path, stamp: tuple[int, int]) -> Index | None:
    """Return the index, or nothing if there is none for a file of this stamp."""
    try:
        index: Any = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    fits = tuple(int(value) for value in index[:, 0]) == stamp
    return np.asarray(index) if fits else None


def _build_index(path: Path, plain: Path, stamp: tuple[int, int], index_path: Path) -> None:
    keys, offsets = array("Q"), array("Q")
    for number, offset, line in _lines(plain):
        passage = parse_record(line, path, number).passage()
        keys.append(_crc(passage.id) << _HALF | len(line))
        offsets.append(offset)
    index = np.empty((2, 1 + len(keys)), dtype=np.uint64)
    index[:, 0] = stamp
    order = np.argsort(np.array(keys, dtype=np.uint64))
    for row, values in enumerate((keys, offsets)):
        index[row, 1:] = np.array(values, dtype=np.uint64)[order]
    _check_unique(path, plain, index[:, 1:])
    with replacing(index_path) as temporary, open(temporary, "wb") as file:
        np.save(file, index)


def _check_unique(path: Path, plain: Path, index: Index) -> None:
    """Compare the ids of lines with the same CRC, which are few unless ids repeat."""
    crcs = index[0] >> np.uint64(_HALF)
    same = np.flatnonzero(crcs[1:] == crcs[:-1])
    seen: dict[str, int] = {}
    with open_binary(plain) as file:
        for place in sorted({*same.tolist(), *(same + 1).tolist()}, key=lambda place: int(index[1, place])):
            file.seek(int(index[1, place]))
            passage = parse_record(file.readline(), path, None).passage()
            if passage.id in seen:
                _raise_duplicate(path, plain, passage.id, int(index[1, place]))
            seen[passage.id] = place


def _raise_duplicate(path: Path, plain: Path, passage_id: str, offset: int) -> NoReturn:
    number = next(number for number, start, _ in _lines(plain) if start == offset)
    raise FormatError(path, number, f"passage {passage_id!r} occurs twice")
