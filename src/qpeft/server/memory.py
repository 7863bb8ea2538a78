"""A long life in little memory: what is free inside the process goes back to the system.

Every batch takes and frees tensors of other sizes. What the C library cannot join it keeps: free, yet counted as the
process's. So a server would hold several times what it uses, the more the longer it lives (docs/serving.md).
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

EVERY = 3.0
"""Seconds of work between two times that memory is given back. Beside 15, no more processor time was seen, and what
lies free between two times no longer spreads from minute to minute."""
ARENA_MAX = -8
"""glibc's number for how many heaps threads may have."""


def share_one_heap() -> None:
    """Let all threads that are made from now on take memory from one heap: what is free in it serves them all."""
    if (library := _glibc()) is not None:
        library.mallopt(ARENA_MAX, 1)


def give_back() -> bool:
    """Return free memory to the system, where the C library can (glibc), and whether there was any."""
    library = _glibc()
    return library is not None and bool(library.malloc_trim(0))


def _glibc() -> Any:
    """Return the C library if it is glibc."""
    library = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    return library if hasattr(library, "malloc_trim") else None
