"""The unfinished output of a long run: one JSON line per finished query, so that nothing is computed twice."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

from qpeft.commands._claim import claimed
from qpeft.errors import StateError
from qpeft.types import Hit, Ranking, ScoringCounts, Window


class Partial:
    """Finished rankings beside an output that is not there yet.

    The first line holds a fingerprint of everything that decides the result, and the settings that were taken from the
    machine (number type, CPU threads), which a resumed run keeps. Queries are worked on in windows, and what is left of
    a window that was not finished is dropped: a score may depend, in its last bits, on the other rows of its batch, and
    a resumed run must equal an uninterrupted one.

    Args:
        output: the file that is being made.
        resume: continue what stands there.

    Raises:
        StateError: an unfinished run stands there and `resume` was not given.
    """

    def __init__(self, output: Path, resume: bool) -> None:
        self.path = output.with_name(output.name + ".partial")
        self.rankings: list[Ranking] = []
        self.settings: dict[str, Any] = {}
        self._before = ScoringCounts()
        self._file: TextIO | None = None
        self._claim = ExitStack()
        self._lines: list[dict[str, Any]] = []
        if self.path.exists():
            if not resume:
                raise StateError(
                    f"{self.path} is an unfinished run: continue it with --resume, or delete it to start afresh"
                )
            self._lines = whole_lines(self.path)
            if self._lines:
                self.settings = self._lines[0]["settings"]

    def open(self, fingerprint: str, settings: Mapping[str, Any], window: Window) -> None:
        """Check that the file belongs to this very run, and get ready to append.

        Raises:
            StateError: it was made with other options, data or model, or another process is working on it.
        """
        header = {"fingerprint": fingerprint, "settings": dict(settings)}
        if self._lines and self._lines[0]["fingerprint"] != fingerprint:
            raise StateError(f"{self.path} was made with other options, data or model; delete it to start afresh")
        finished = self._lines[1:]
        finished = finished[: window.whole(len(line["hits"]) for line in finished)]
        self.rankings = [
            Ranking(line["query"], tuple(Hit(passage_id, score) for passage_id, score in line["hits"]))
            for line in finished
        ]
        if finished:
            self._before = ScoringCounts(**finished[-1]["counts"])
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._claim.enter_context(claimed(self.path))
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in [header, *finished]), encoding="utf-8")
        os.replace(temporary, self.path)
        self._file = self.path.open("a", encoding="utf-8")

    def add(self, ranking: Ranking, counts: ScoringCounts) -> None:
        """Append a finished query; `counts` are those since the process began."""
        assert self._file is not None
        line = {
            "query": ranking.query_id,
            "hits": [[hit.passage_id, hit.score] for hit in ranking.hits],
            "counts": dataclasses.asdict(self.counts(counts)),
        }
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def counts(self, counts: ScoringCounts) -> ScoringCounts:
        """Return `counts` of this process together with those of the earlier ones."""
        total = dataclasses.replace(self._before)
        total.add(counts)
        return total

    def close(self) -> None:
        """Stop appending; the file stays."""
        if self._file is not None:
            self._file.close()
        self._claim.close()

    def remove(self) -> None:
        """Delete the file, once the output is in place."""
        self.close()
        self.path.unlink(missing_ok=True)


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
