"""Every error that qpeft raises on purpose; those that only the server raises stand in `qpeft.server`, below these.

    QpeftError
    ├── InputError            a file or a value given by the user cannot be used
    │   ├── FormatError       … names the file and the line
    │   ├── UnknownIdError    … an id that the collection does not have
    │   └── QueryError        … an empty query, or one that does not fit the model
    ├── OptionError           an unknown option, or options that contradict each other
    ├── ModelError            a model that cannot be found, opened or used
    │   └── PassageCacheError … that remembers of a passage what the cache cannot keep
    ├── AdapterError          an adapter folder that is damaged, or made for another model
    ├── ScoreError            scores that cannot be ranked: NaN, infinite, duplicate ids
    ├── StateError            an unfinished or foreign file stands where output should go
    └── MissingDependencyError  an optional package is needed; says which extra brings it

The command line prints the message alone and ends with exit code 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from os import PathLike


class QpeftError(Exception):
    """Base of all errors of this package."""


class InputError(QpeftError):
    """A file or value given by the user cannot be used."""


class FormatError(InputError):
    """A file does not follow its format; `path` and `line` (from 1) say where."""

    def __init__(self, path: str | PathLike[str], line: int | None, message: str) -> None:
        self.path = str(path)
        self.line = line
        where = self.path if line is None else f"{self.path}:{line}"
        super().__init__(f"{where}: {message}")


class UnknownIdError(InputError):
    """A query or passage id that the collection does not have."""


class QueryError(InputError):
    """A query that cannot be scored: empty, or too long for the model."""


class OptionError(QpeftError):
    """An unknown option value, or options that contradict each other."""


class ModelError(QpeftError):
    """A model that cannot be found, opened or used for what was asked."""


class PassageCacheError(ModelError):
    """A model that remembers more of a passage than the passage cache can keep."""


class AdapterError(QpeftError):
    """An adapter that is not one, is damaged, or was made for another model."""


class ScoreError(QpeftError):
    """Scores that cannot be ranked: NaN, infinite, or two for one passage."""


class StateError(QpeftError):
    """An unfinished or foreign file stands where output should go."""


class MissingDependencyError(QpeftError):
    """An optional package is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"this needs the package {package!r}: pip install 'qpeft[{extra}]'")


def at_least(least: float, **options: float | None) -> None:
    """Check options, by their Python names; None is one that was not given.

    Raises:
        OptionError: a value below `least`, or no number.
    """
    for name, value in options.items():
        if value is not None and not value >= least:
            raise OptionError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}")


def nearest(word: str, known: Iterable[str]) -> str:
    """Return a sentence tail that offers the nearest spelling of `word`, else lists what is known."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(known)}" if known else ""
