"""A command line's arguments, read as options with their values."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

_OPTION = re.compile(r"--[\w-]+(=.*)?", re.DOTALL)
"""What else begins with dashes is a text."""


class Given(NamedTuple):
    """An option as it was given, or a text that stands alone."""

    option: str
    """Its name without the dashes before it, with `-` inside whichever way it was typed; empty for such a text."""
    value: str | None
    """None if nothing follows it."""
    typed: tuple[str, ...]
    """The arguments that it was made of, with the parser's spelling of the name."""


def given(arguments: Sequence[str]) -> Iterator[Given]:
    """Yield the options in order, each with what follows it, unless that is an option too."""
    remaining = list(reversed(arguments))
    while remaining:
        argument = remaining.pop()
        if not _OPTION.fullmatch(argument):
            yield Given("", argument, (argument,))
            continue
        name, equals, value = argument.partition("=")
        name = name.removeprefix("--").replace("_", "-")
        spelt = "--print_config" if name == "print-config" else f"--{name}"
        if equals:
            yield Given(name, value, (f"{spelt}={value}",))
        elif remaining and not _OPTION.fullmatch(remaining[-1]):
            value = remaining.pop()
            yield Given(name, value, (spelt, value))
        else:
            yield Given(name, None, (spelt,))
