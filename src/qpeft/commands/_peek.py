"""Options that decide which other options there are, read before the parser exists."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from qpeft import methods
from qpeft.commands._config_file import read_options
from qpeft.errors import AdapterError, InputError


def peek(arguments: Sequence[str], option: str, default: str) -> str:
    """Return an option's value before its parser exists: from the flags, else the YAML files, else the default."""
    values = list(_flags(arguments, option))
    for path in [] if values else _flags(arguments, "config"):
        with contextlib.suppress(InputError):  # said by the parser
            options = read_options(path)
            if (name := option.replace("-", "_")) in options:
                values.append(options[name])
    return str((values and values[-1]) or default)


def peek_method(arguments: Sequence[str]) -> str:
    """Return the method that the arguments ask for, or that their adapter was trained for."""
    asked, adapter = (peek(arguments, option, "") or None for option in ("method", "adapter"))
    with contextlib.suppress(AdapterError):  # said when the command runs, and not in place of its --help
        return methods.chosen(asked, adapter)
    return methods.chosen(asked, None)


def _flags(arguments: Sequence[str], option: str) -> Iterator[str]:
    """Yield the values that an option is given; the last counts."""
    for argument, following in zip(arguments, [*arguments[1:], None], strict=False):
        if argument.startswith(f"--{option}="):
            yield argument.split("=", 1)[1]
        elif argument == f"--{option}" and following is not None:
            yield following
