"""The unfinished output of long work: one JSON line per finished piece, so that nothing is computed twice."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

from qpeft import memory
from qpeft.atomic import make_folder, writing
from qpeft.commands._claim import claimed
from qpeft.commands._same_work import as_kept, check_same
from qpeft.data.files import write_text
from qpeft.errors import StateError
from qpeft.model_config import ModelConfig


class Unfinished:
    """Finished pieces of work whose output is not there yet, under a header that says what they are of.

    The header holds everything that decides the result, and the settings that were taken from the machine (number type,
    CPU threads), which resumed work keeps.

    Args:
        path: the file.
        kind: what is made, for messages.
        resume: continue what stands there.

    Raises:
        StateError: something unfinished stands there and `resume` was not given.

    Attributes:
        lines: what earlier processes finished.
    """

    def __init__(self, path: Path, kind: str, resume: bool) -> None:
        self.path = path
        self._file: TextIO | None = None
        self._claim = ExitStack()
        if path.exists() and not resume:
            raise StateError(f"{path} is an unfinished {kind}: continue it with --resume, or delete it to start afresh")
        self._header, *self.lines = (whole_lines(path) if path.exists() else []) or [{}]

    @property
    def settings(self) -> dict[str, Any]:
        """Return the settings that were taken from the machine."""
        found: dict[str, Any] = self._header.get("settings", {})
        return found

    def open(self, facts: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        """Check that the file belongs to this very work, write what `lines` keeps of it, and get ready to append.

        Raises:
            StateError: it was made with other options, data or model, or another process is working on it.
        """
        if self._header:
            check_same(self.path, self._header.get("facts", {}), facts)
        header = {"facts": as_kept(facts), "settings": dict(settings)}
        make_folder(self.path.parent)
        self._claim.enter_context(claimed(self.path))
        with write_text(self.path) as file:
            file.writelines(json.dumps(line) + "\n" for line in [header, *self.lines])
        self._file = self.path.open("a", encoding="utf-8")

    def add(self, line: dict[str, Any]) -> None:
        """Append a finished piece.

        Raises:
            InputError: there is no room for it; work can be resumed with those before it.
        """
        assert self._file is not None
        with writing(self.path):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Stop appending; the file stays."""
        with self._claim, writing(self.path):  # what did not fit is tried once more
            if self._file is not None:
                self._file.close()

    def remove(self) -> None:
        """Delete the file, once the output is in place."""
        self.close()
        self.path.unlink(missing_ok=True)


def open_as_begun(
    model: ModelConfig, settings: Mapping[str, Any], load: Callable[[ModelConfig], Any] | None = None
) -> Any:
    """Open a model with the number type and the threads that work began with; new work takes this machine's.

    Sums are split among the threads, so their number decides the last bits of a score. It is set for new work too,
    because torch then keeps the maths library from using fewer as it sees fit; and before the model is opened, as the
    size of batches follows it.

    Args:
        model: how it was asked for.
        settings: `dtype` and `threads` of the unfinished work, if there is any.
        load: what opens it; by default `load_lm`.
    """
    import torch

    from qpeft.loading import load_lm

    def keep_threads() -> None:
        torch.set_num_threads(settings.get("threads", torch.get_num_threads()))

    keep_threads()
    lm = (load or load_lm)(dataclasses.replace(model, dtype=settings.get("dtype", model.dtype)))
    keep_threads()
    memory.hold()
    return lm


def whole_lines(path: Path) -> list[dict[str, Any]]:
    """Return the entries of an unfinished file of JSON lines, up to where writing was interrupted."""
    lines = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            if not text.endswith("\n"):
                break  # the process was killed while writing it
            try:
                lines.append(json.loads(text))
            except ValueError:
                break
    return lines
