"""Options that are checked against their annotations, whether a command line or Python gives them."""

from __future__ import annotations

import os
import typing
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any

import numpy as np

from qpeft.errors import OptionError, nearest

_KINDS: dict[Any, tuple[tuple[type[Any], ...], str]] = {
    bool: ((bool,), "True or False"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    str: ((str,), "text"),
}
"""What an annotation takes, and how that is called."""


@dataclass(frozen=True)
class Checked:
    """A dataclass whose values are of the kinds that it names; paths become texts, and numpy's numbers Python's.

    Lists become tuples.

    Raises:
        OptionError: a value is of another kind, or none of the choices.
    """

    def __post_init__(self) -> None:
        for name, kind in typing.get_type_hints(type(self)).items():
            value = getattr(self, name)
            if isinstance(value, os.PathLike | np.generic):
                value = os.fspath(value) if isinstance(value, os.PathLike) else value.item()
                object.__setattr__(self, name, value)
            if isinstance(value, list):
                value = tuple(value)
                object.__setattr__(self, name, value)
            kinds = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, UnionType) else (kind,)
            if not any(_is(value, each) for each in kinds):
                raise OptionError(f"--{name.replace('_', '-')} is {value!r:.60}{_instead(value, kinds)}")


def _is(value: Any, kind: Any) -> bool:
    if typing.get_origin(kind) is typing.Literal:
        return value in typing.get_args(kind)
    if kind is NoneType:
        return value is None
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_is(each, typing.get_args(kind)[0]) for each in value)
    if kind not in _KINDS:
        return True
    return isinstance(value, _KINDS[kind][0]) and (kind is bool or not isinstance(value, bool))


def _instead(value: Any, kinds: tuple[Any, ...]) -> str:
    for kind in kinds:
        if typing.get_origin(kind) is typing.Literal:
            return nearest(str(value), typing.get_args(kind))
    for kind in kinds:
        if typing.get_origin(kind) is tuple:
            return f"; it must be a tuple or a list of {_KINDS[typing.get_args(kind)[0]][1]}"
    return f"; it must be {' or '.join(_KINDS[kind][1] for kind in kinds if kind in _KINDS)}"
