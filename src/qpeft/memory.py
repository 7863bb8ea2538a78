"""What the C library does with memory that is free inside the process: gives it back to the system, or holds it.

Every batch takes and frees tensors of other sizes. What the library cannot join it keeps: free, yet counted as the
process's. So a server would hold several times what it uses, the more the longer it lives (docs/serving.md), and gives
back. Training and reranking take tensors of the same sizes at every step and in every layer, and hold them: fresh pages
cost 5 to 10 % of a training's time, and of reranking some, where models are large.
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
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""glibc's numbers for how much may lie free at the end of a heap, and from what size on memory is not of a heap."""
HELD = (2**30, 2**25)
"""Bytes of that: what newer versions allow, and what older ones do."""


def share_one_heap() -> None:
    """Let all threads that are made from now on take memory from one heap: what is free in it serves them all."""
    if (library := _glibc()) is not None:
        library.mallopt(ARENA_MAX, 1)


def give_back() -> bool:
    """Return free memory to the system, where the C library can (glibc), and whether there was any."""
    library = _glibc()
    return library is not None and bool(library.malloc_trim(0))


def hold() -> None:
    """Keep memory that tensors gave back for those that come."""
    if (library := _glibc()) is not None:
        any(library.mallopt(MMAP_THRESHOLD, size) for size in HELD)
        library.mallopt(TRIM_THRESHOLD, 2**31 - 1)


def _glibc() -> Any:
    """Return the C library if it is glibc."""
    library = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    return library if hasattr(library, "malloc_trim") else None
