"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

from qpeft.errors import InputError

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""What writing ends in where the disk is full, or the user may not have more of it."""

_NAMED = {"stdout": 1, "stderr": 2}
_HANDLE = re.compile(rf"/dev/(?P<name>{'|'.join(_NAMED)})|(/dev|/proc/self)/fd/(?P<number>\d+)")


@contextmanager
def writing(path: str | PathLike[str]) -> Iterator[None]:
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
def replacing(path: str | PathLike[str]) -> Iterator[Path]:
    """Yield the path of a temporary sibling: moved to `path` on success, removed on failure.

    Folders on the way are made. A link stays a link; a pipe or device is written directly, as it cannot be replaced.
    What a shell redirects /dev/stdout to is written behind what stands there.

    Raises:
        InputError: `path` is a folder, or its folder cannot be made, or there is no room for it.
    """
    if os.path.isdir(path):
        raise InputError(f"{os.fspath(path)}: is a folder")
    if is_stream(path):
        with writing(path), _stream(path) as place:
            yield place
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
def replacing_folder(folder: str | PathLike[str]) -> Iterator[Path]:
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
def _stream(path: str | PathLike[str]) -> Iterator[Path]:
    number = _handle(path)
    if number is None or not os.path.isfile(path):
        yield Path(path)
        return
    # Opened by its name, the file would be written from its beginning, over what others wrote there.
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "output"
        yield made
        with made.open("rb") as source, open(os.dup(number), "wb") as target:
            shutil.copyfileobj(source, target)


def _handle(path: str | PathLike[str]) -> int | None:
    """Return the number of the open file that a name such as /dev/stdout stands for."""
    found = _HANDLE.fullmatch(os.path.abspath(path))
    return None if found is None else _NAMED.get(found["name"]) or int(found["number"])


def is_stream(path: str | PathLike[str]) -> bool:
    """Whether a path is a pipe, a device or an open file: nothing can stand beside it or in its place."""
    if os.path.isdir(path) or not os.path.exists(path):
        return False
    return not os.path.isfile(path) or _handle(path) is not None


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
