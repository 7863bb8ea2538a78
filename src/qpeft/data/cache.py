"""Where files go that can be made again from others: indexes, unpacked corpora."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from qpeft.data.files import make_folder


def cache_folder(source: Path) -> Path:
    """Make and return the folder for what is derived from the file `source`.

    That is `.qpeft` beside the file, or, where nothing can be written there, a folder of the user's cache. The
    environment variable `QPEFT_CACHE` names another place for all of them.

    Raises:
        InputError: neither of them can be made.
    """
    parent = source.absolute().parent
    root = os.environ.get("QPEFT_CACHE")
    if not root and _is_writable(parent / ".qpeft"):
        return parent / ".qpeft"
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qpeft"
    folder = (Path(root) if root else user) / hashlib.sha256(str(parent).encode()).hexdigest()[:16]
    make_folder(folder)
    return folder


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)
