"""Whether work that was begun or finished is the same as what is asked for now, and if not, what differs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qpeft.errors import StateError

NAMED = 3
"""Differences that a message names."""


def as_kept(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return facts as they come back from a JSON file."""
    kept: dict[str, Any] = json.loads(json.dumps(facts, default=str))
    return kept


def is_finished(made: Mapping[str, Any] | None, facts: Mapping[str, Any]) -> bool:
    """Return whether finished work is what is asked for now.

    Args:
        made: its provenance, from a JSON file, if there is any.
        facts: what decides the result.
    """
    return made is not None and as_kept(facts).items() <= made.items()


def check_same(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Compare what decides the result, as it was kept with unfinished work and as it is now.

    Args:
        path: what a message says cannot be continued.
        before: from a JSON file.
        now: options, and what tells data and model apart.

    Raises:
        StateError: they differ; the message names the first options that do, or what else, if no option does.
    """
    found = list(_differences("", before, as_kept(now)))
    if found:
        told = [each for each in found if each.startswith("--")] or found
        named = ", ".join(told[:NAMED]) + ", …" * (len(told) > NAMED)
        raise StateError(f"{path} was made with other options, data or model ({named}); delete it to start afresh")


def _differences(name: str, before: Any, now: Any) -> Iterator[str]:
    """Yield where two values differ: an option with both values, anything else by its name."""
    if before == now:
        return
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*now, *(key for key in before if key not in now)]:
            yield from _differences(f"{name}.{key}".lstrip("."), before.get(key), now.get(key))
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for index, pair in enumerate(zip(before, now, strict=True)):
            yield from _differences(f"{name}.{index}", *pair)
    elif name.startswith("options."):
        option = name.removeprefix("options.").replace("_", "-")
        old, new = ("not given" if value is None else json.dumps(value, ensure_ascii=False) for value in (before, now))
        yield f"--{option} was {old} and is {new}"
    else:
        yield name
