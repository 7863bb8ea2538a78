"""Where files go that can be made again: indexes, unpacked corpora, settings that were measured."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from qpeft.atomic import make_folder


def user_cache() -> Path:
    """Return the folder for what belongs to no file: QPEFT_CACHE if that is set, else `qpeft` in the user's cache."""
    if root := os.environ.get("QPEFT_CACHE"):
        return Path(root)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qpeft"


def cache_folder(source: Path) -> Path:
    """Make and return the folder for what is derived from the file `source`.

    That is `.qpeft` beside the file, or, where nothing can be written there, a folder of the user's cache. The
    environment variable `QPEFT_CACHE` names another place for all of them.

    Raises:
        InputError: neither of them can be made.
    """
    parent = source.absolute().parent
    if not os.environ.get("QPEFT_CACHE") and _is_writable(parent / ".qpeft"):
        return parent / ".qpeft"
    folder = user_cache() / hashlib.sha256(str(parent).encode()).hexdigest()[:16]
    make_folder(folder)
    return folder


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)
