"""Memory that is free inside the process goes back to the system.

Every batch takes and frees tensors of other sizes, and the C library keeps what it cannot join: free, yet counted as the
process's. Over hours a server so holds several times what it uses (docs/serving.md).
"""

from __future__ import annotations

import ctypes
import sys

EVERY = 30.0
"""Seconds of work between two times: pages that come back anew cost a twentieth of a second in all."""


def give_back() -> bool:
    """Return free memory to the system, where the C library can (glibc), and whether there was any."""
    if not sys.platform.startswith("linux"):
        return False
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return trim is not None and bool(trim(0))
