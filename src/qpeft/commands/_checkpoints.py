"""What an unfinished training leaves beside its checkpoints, so that it goes on as it began, and alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from qpeft.atomic import make_folder
from qpeft.commands._claim import claimed
from qpeft.commands._output import check_adapter_folder
from qpeft.commands._same_work import as_kept, check_same
from qpeft.data.records import write_json
from qpeft.errors import StateError
from qpeft.training.processes import processes

BEGUN = "begun.json"


def read_begun(output: Path, checkpoints: Path, *, resume: bool) -> dict[str, Any]:
    """Return what an unfinished training left of its options, number type and threads; nothing if there is none."""
    check_adapter_folder(output)
    if not any(checkpoints.glob("checkpoint-*")):
        return {}
    if not resume:
        raise StateError(
            f"{checkpoints} is an unfinished training: continue it with --resume, or delete it to start afresh"
        )
    return read_mark(checkpoints)


def read_mark(folder: Path) -> dict[str, Any]:
    """Return the options, number type and threads of the training that a folder is of."""
    try:
        found: dict[str, Any] = json.loads((folder / BEGUN).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StateError(f"{folder} cannot be continued: {BEGUN} is not readable; delete it") from error
    return found


@contextmanager
def claim(checkpoints: Path, mark: dict[str, Any]) -> Iterator[None]:
    """Keep processes of other trainings from the checkpoints, and leave a mark beside them."""
    if not processes().first:
        yield
        return
    make_folder(checkpoints)
    with claimed(checkpoints):
        leave_mark(checkpoints, mark, read_mark(checkpoints) if any(checkpoints.glob("checkpoint-*")) else {})
        yield


def leave_mark(folder: Path, mark: dict[str, Any], begun: dict[str, Any]) -> None:
    """Leave a mark beside what a training writes, or compare with the one that is there."""
    if begun:
        check_same(folder, begun, mark)
    make_folder(folder)
    write_json(folder / BEGUN, as_kept(mark))


def clear(checkpoints: Path) -> None:
    """Remove what a finished training went on from; the logs of trackers, which may stand there, stay."""
    for checkpoint in checkpoints.glob("checkpoint-*"):
        shutil.rmtree(checkpoint, ignore_errors=True)
    with suppress(OSError):
        (checkpoints / BEGUN).unlink(missing_ok=True)
        checkpoints.rmdir()
