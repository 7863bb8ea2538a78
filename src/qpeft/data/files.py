"""Text files: UTF-8, plain or gzip by name, and never half written."""

from __future__ import annotations

import gzip
import io
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from typing import BinaryIO, Literal, TextIO, cast

from qpeft.atomic import replacing
from qpeft.errors import FormatError, InputError

StrPath = str | PathLike[str]


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


def _open(path: StrPath, mode: Literal["rb", "wb"], asked: StrPath) -> BinaryIO:
    try:
        return open(path, mode)
    except OSError as error:
        raise InputError(f"{os.fspath(asked)}: {error.strerror}") from error


def _is_gzip(path: StrPath) -> bool:
    return os.fspath(path).endswith(".gz")
