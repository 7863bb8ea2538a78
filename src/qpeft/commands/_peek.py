"""Options that decide which other options there are, read before the parser exists."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from qpeft import methods
from qpeft.commands._arguments import given
from qpeft.commands._config_file import read_options
from qpeft.errors import AdapterError, InputError


def peek(arguments: Sequence[str], option: str, default: str) -> str:
    """Return an option's value before its parser exists: from the flags, else the YAML files, else the default."""
    typed = list(given(arguments))
    values = [each.value for each in typed if each.option == option]
    files = [each.value for each in typed if each.option == "config" and each.value]
    for path in [] if values else files:
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
