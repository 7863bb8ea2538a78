"""What all saved indexes share: passage ids and options beside the library's own files, moved into place when whole."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qpeft.atomic import replacing_folder
from qpeft.errors import InputError, StateError

_IDS = "passage_ids.json"
_OPTIONS = "qpeft_index.json"


@contextmanager
def new_index_folder(folder: Path, passage_ids: list[str], options: Mapping[str, Any]) -> Iterator[Path]:
    """Yield a temporary folder to save an index in; it becomes `folder` when all went well.

    Raises:
        StateError: `folder` is a file, or holds something that is not an index of this package.
        InputError: it cannot be made.
    """
    _check_replaceable(folder)
    with replacing_folder(folder) as temporary:
        yield temporary
        (temporary / _IDS).write_text(json.dumps(passage_ids), encoding="utf-8")
        (temporary / _OPTIONS).write_text(json.dumps(dict(options), indent=2), encoding="utf-8")


def read_index_folder(folder: Path) -> tuple[list[str], dict[str, Any]]:
    """Return passage ids and options of a saved index.

    Raises:
        InputError: this is no index.
    """
    try:
        ids = json.loads((folder / _IDS).read_text(encoding="utf-8"))
        options = json.loads((folder / _OPTIONS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} is not a qpeft index: {error}") from error
    return ids, options


def is_index_of(folder: Path, options: Mapping[str, Any]) -> bool:
    """Say whether `folder` holds a whole index that was made with exactly these options.

    Raises:
        StateError: no index can be saved there, as in `new_index_folder`.
    """
    _check_replaceable(folder)
    return (folder / _OPTIONS).is_file() and read_index_folder(folder)[1] == dict(options)


def _check_replaceable(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise StateError(f"{folder} is a file, not the folder of an index; it is left as it is")
    if folder.exists() and any(folder.iterdir()) and not (folder / _OPTIONS).is_file():
        raise StateError(f"{folder} is not empty and not a qpeft index; it is left as it is")
