"""Memory of this process, as Linux counts it.

`ru_maxrss` will not do: its maximum survives `exec`, so that a child begins with its parent's.
"""

from __future__ import annotations

from pathlib import Path

_STATUS = Path("/proc/self/status")
_REFERENCES = Path("/proc/self/clear_refs")


def resident_mib() -> float:
    """Return what is in memory now, in MiB."""
    return _field("VmRSS")


def peak_mib() -> float:
    """Return the most that was in memory since the last reset, in MiB."""
    return _field("VmHWM")


def reset_peak() -> None:
    """Let the peak begin anew at what is in memory now; where the system refuses, it stays that of the process."""
    try:
        _REFERENCES.write_text("5")
    except OSError:
        return


def _field(name: str) -> float:
    return int(_STATUS.read_text(encoding="utf-8").split(f"{name}:")[1].split()[0]) / 1024
