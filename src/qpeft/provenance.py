"""What made a file: written beside every output as `<output>.provenance.json`."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import os
import platform
import sys
from collections.abc import Collection, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from qpeft.atomic import is_stream
from qpeft.data.records import write_json

PACKAGES = (
    "qpeft", "torch", "transformers", "tokenizers", "accelerate", "peft",
    "bm25s", "ir_measures", "sentence-transformers", "numpy",
)  # fmt: skip


def provenance(**facts: Any) -> dict[str, Any]:
    """Return `facts` with the time, the versions of what took part, and the machine."""
    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **facts,
        "versions": {"python": platform.python_version(), **_versions()},
        "machine": {
            "processor": processor_name(), **_gpu(), "cores": os.cpu_count(), "system": platform.system(),
        },
    }  # fmt: skip


def _gpu() -> dict[str, str]:
    """Return the GPU's name, if a model could be on one: what has not loaded torch has no model."""
    torch: Any = sys.modules.get("torch")
    return {"gpu": torch.cuda.get_device_name()} if torch is not None and torch.cuda.is_available() else {}


def options_of(*parts: Any, without: Collection[str] = ("resume", "output")) -> dict[str, Any]:
    """Return the options of some dataclasses in one mapping.

    Args:
        parts: dataclasses, in order; None is passed over.
        without: names that do not decide what is made.
    """
    given = (dataclasses.asdict(part) for part in parts if part is not None)
    return {name: value for part in given for name, value in part.items() if name not in without}


def provenance_path(output: Path) -> Path:
    """Return where the provenance of `output` stands."""
    return output.with_name(output.name + ".provenance.json")


def write_provenance(output: Path, facts: Mapping[str, Any]) -> None:
    """Write the provenance of `output` beside it, with its hash; a pipe or device has no such place.

    Raises:
        InputError: it cannot be written.
    """
    if output.is_file() and not is_stream(output):
        write_json(provenance_path(output), {**facts, "output": {"sha256": file_fingerprint(output)}})


def input_fingerprint(path: str) -> str | None:
    """Return the SHA-256 of what was read; None for a pipe, which cannot be read a second time."""
    return file_fingerprint(Path(path)) if Path(path).is_file() else None


def file_fingerprint(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_fingerprint(folder: Path) -> str:
    """Return the SHA-256 of a model folder's weight files and configuration."""
    digest = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def fingerprint(facts: Mapping[str, Any]) -> str:
    """Return the SHA-256 of facts that JSON can hold, whatever their order."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def processor_name() -> str:
    """Return the processor's marketing name where the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
