"""The YAML files behind --config."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import yaml

from qpeft.errors import FormatError, InputError


def read_options(path: str) -> dict[str, Any]:
    """Return the options that a file sets, by their names with `_`.

    Raises:
        InputError: the file cannot be opened, or only once.
        FormatError: it is not YAML, or holds something else.
    """
    if Path(path).is_fifo():  # the parser reads it again, and would find nothing
        raise InputError(f"--config {path}: is a pipe; options are read from a file")
    try:
        with open(path, encoding="utf-8-sig") as file:
            options = yaml.safe_load(file)
    except OSError as error:
        raise InputError(f"--config {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise FormatError(path, None, "is not UTF-8") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise FormatError(path, mark and mark.line + 1, getattr(error, "problem", None) or "is not YAML") from error
    if not isinstance(options, dict | None):
        raise FormatError(path, None, "holds no options, as in `depth: 20`, one a line")
    return options or {}


def file_arguments(path: str, hints: Mapping[str, Any]) -> list[str]:
    """Return the arguments by which a parser reads a file; it would misread one that sets nothing, or only nulls.

    Args:
        path: the file.
        hints: types of options, by their names with `_`.

    Raises:
        InputError: as `read_options`.
        FormatError: as `read_options`, or yes and no, which YAML takes for true and false, where they are meant.
    """
    options = read_options(path)
    for option, value in options.items():
        if isinstance(value, bool) and {"yes", "no"} <= {*get_args(hints.get(option))}:
            raise FormatError(path, None, f"{option}: put yes and no in quotes; YAML takes them for true and false")
    if all(value is None for value in options.values()):
        return [f"--{option.replace('_', '-')}=null" for option in options]
    return ["--config", path]
