"""Settings that were measured to be the quickest for a model on this machine.

`qpeft doctor --tune` writes them, and opening a model reads them wherever an option is left at its default. They belong
to one model, device, processor and version of torch; anything else is as if nothing had been measured. Delete the file
to forget them.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qpeft.data.cache import user_cache
from qpeft.data.records import write_json
from qpeft.provenance import fingerprint, processor_name


@dataclass(frozen=True)
class Tuning:
    """What was found to be quickest."""

    dtype: Literal["float32", "bfloat16", "float16"]
    attention_kernel: str
    batch_tokens: int
    threads: int | None = None
    """Threads of torch on a CPU."""
    compiled: bool = False
    """Whether norms, MLPs and rotations are compiled."""


def tuning_file() -> Path:
    """Return where settings are kept."""
    return user_cache() / "tuning.json"


def tuning_key(model: str, device: str, torch_version: str, cached: bool) -> str:
    """Return what settings belong to; `cached`: whether passages are encoded once and kept."""
    machine = {"processor": processor_name(), "cores": os.cpu_count(), "device": device, "torch": torch_version}
    return fingerprint({"model": model, "cached": cached, **machine})


def read_tuning(key: str) -> Tuning | None:
    """Return the settings of a key, if they were measured."""
    facts = _read().get(key)
    try:
        return None if facts is None else Tuning(**facts["settings"])
    except (KeyError, TypeError):
        return None  # another version wrote it


def write_tuning(key: str, tuning: Tuning | None, **facts: Any) -> None:
    """Keep the settings of a key with what was measured; None forgets them.

    Raises:
        InputError: the file cannot be made.
    """
    known = _read()
    known.pop(key, None)
    if tuning is not None:
        known[key] = {"settings": dataclasses.asdict(tuning), **facts}
    write_json(tuning_file(), known)


def _read() -> dict[str, Any]:
    try:
        known = json.loads(tuning_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
