"""One process at a time on an unfinished output: two would write over each other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from qpeft.errors import StateError


@contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Keep other processes from a file or folder that is being made; a process that dies gives it up.

    Raises:
        StateError: another process has it, or the folder cannot be written to.
    """
    file = path.with_name(f".{path.name}.lock")
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise StateError(f"{path}: another process is working on it") from error
    except OSError as error:
        raise StateError(f"{path.parent} cannot be written to: {error.strerror}") from error
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        lock.release(force=True)
