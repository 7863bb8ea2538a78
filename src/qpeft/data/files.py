"""Text files: UTF-8, plain or gzip by name, and never half written."""

from __future__ import annotations

import errno
import gzip
import io
import os
import secrets
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import BinaryIO, Literal, TextIO, cast

from qpeft.errors import FormatError, InputError

StrPath = str | PathLike[str]
NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""What writing ends in where the disk is full, or the user may not have more of it."""


@contextmanager
def open_binary(path: StrPath) -> Iterator[BinaryIO]:
    """Open a file for reading as bytes, unpacked where the name ends in `.gz`.

    Raises:
        InputError: the file cannot be opened.
        FormatError: while reading, the gzip stream turns out damaged or cut short.
    """
    with _open(path, "rb", path) as raw:
        try:
            yield io.BufferedReader(gzip.GzipFile(fileobj=raw)) if _is_gzip(path) else raw
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise FormatError(path, None, f"damaged gzip file: {error}") from error


@contextmanager
def open_text(path: StrPath) -> Iterator[TextIO]:
    r"""Open a file for reading as UTF-8 text; lines end in `\n` only, so that line numbers are those of an editor.

    Raises:
        InputError: the file cannot be opened.
        FormatError: while reading, the file is damaged or not UTF-8.
    """
    with open_binary(path) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="\n") as file:
        try:
            yield file
        except UnicodeDecodeError as error:
            raise FormatError(path, None, f"not UTF-8: {error.reason}") from error


def numbered_lines(path: StrPath) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line without its end), blank lines left out.

    Raises:
        InputError: the file cannot be opened.
        FormatError: the file is damaged, or a line is not UTF-8.
    """
    with open_binary(path) as file:
        for number, raw in enumerate(file, start=1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise FormatError(path, number, f"not UTF-8: {error.reason}") from error
            if line.strip():
                yield number, line.rstrip("\r\n")


@contextmanager
def writing(path: StrPath) -> Iterator[None]:
    """Name the file that is written within this context where there is no room for it.

    Raises:
        InputError: there is none.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise InputError(f"{os.fspath(path)} cannot be written: {error.strerror}") from error


@contextmanager
def replacing(path: StrPath) -> Iterator[Path]:
    """Yield the path of a temporary sibling: moved to `path` on success, removed on failure.

    Folders on the way are made. A link stays a link; a pipe or device is written directly, as it cannot be replaced.

    Raises:
        InputError: `path` is a folder, or its folder cannot be made, or there is no room for it.
    """
    if os.path.isdir(path):
        raise InputError(f"{os.fspath(path)}: is a folder")
    if is_stream(path):
        with writing(path):
            yield Path(path)
        return
    target = Path(os.path.realpath(path))
    make_folder(target.parent)
    temporary = temporary_sibling(target)
    try:
        with writing(path):
            yield temporary
            os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(folder: StrPath) -> Iterator[Path]:
    """Yield a temporary folder beside `folder`: moved there on success, over an older one, and removed on failure.

    A link stays a link.

    Raises:
        InputError: it cannot be made or moved, or there is no room for it; what stood there is untouched.
    """
    target = Path(os.path.realpath(folder))
    temporary = temporary_sibling(target)
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{os.fspath(folder)}: {error.strerror}") from error
    try:
        with writing(folder):
            yield temporary
        try:
            _move_folder(temporary, target)
        except OSError as error:
            raise InputError(f"{os.fspath(folder)}: {error.strerror}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _move_folder(temporary: Path, target: Path) -> None:
    if not target.exists():
        os.replace(temporary, target)
        return
    old = temporary_sibling(target)
    os.replace(target, old)
    try:
        os.replace(temporary, target)
    except BaseException:
        os.replace(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def write_text(path: StrPath) -> Iterator[TextIO]:
    """Open a file for writing as UTF-8 text, gzip where the name ends in `.gz`; it appears whole or not at all.

    Raises:
        InputError: the file cannot be made.
    """
    with replacing(path) as temporary, _open(temporary, "wb", path) as raw:
        # No name and no time in the gzip header: equal content gives equal bytes.
        packed = gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) if _is_gzip(path) else raw
        with io.TextIOWrapper(cast(BinaryIO, packed), encoding="utf-8", newline="\n") as file:
            yield file


def is_stream(path: StrPath) -> bool:
    """Whether a path is a pipe or device: it takes text, but nothing can stand beside it or in its place."""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it.

    Raises:
        InputError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror}") from error


def temporary_sibling(target: Path) -> Path:
    """Return a hidden, unused name beside `target`, so that moving it there stays within one file system."""
    return target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def _open(path: StrPath, mode: Literal["rb", "wb"], asked: StrPath) -> BinaryIO:
    try:
        return open(path, mode)
    except OSError as error:
        raise InputError(f"{os.fspath(asked)}: {error.strerror}") from error


def _is_gzip(path: StrPath) -> bool:
    return os.fspath(path).endswith(".gz")
