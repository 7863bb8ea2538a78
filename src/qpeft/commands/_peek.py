"""Options that decide which other options there are, read before the parser exists."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import yaml

from qpeft import methods
from qpeft.errors import AdapterError


def peek(arguments: Sequence[str], option: str, default: str) -> str:
    """Return an option's value before its parser exists: from the flags, else the YAML file, else the default."""
    value = _flag(arguments, option)
    if value is None and (path := _flag(arguments, "config")) is not None:
        with contextlib.suppress(OSError, yaml.YAMLError), open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file)
            value = content.get(option.replace("-", "_")) if isinstance(content, dict) else None
    return str(value or default)


def peek_method(arguments: Sequence[str]) -> str:
    """Return the method that the arguments ask for, or that their adapter was trained for."""
    asked, adapter = (peek(arguments, option, "") or None for option in ("method", "adapter"))
    with contextlib.suppress(AdapterError):  # said when the command runs, and not in place of its --help
        return methods.chosen(asked, adapter)
    return methods.chosen(asked, None)


def _flag(arguments: Sequence[str], option: str) -> str | None:
    """Return an option's last value, which is the one that counts."""
    value = None
    for argument, following in zip(arguments, [*arguments[1:], None], strict=False):
        if argument.startswith(f"--{option}="):
            value = argument.split("=", 1)[1]
        elif argument == f"--{option}" and following is not None:
            value = following
    return value
