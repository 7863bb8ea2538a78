"""Passages that are given as options."""

from __future__ import annotations

from collections.abc import Sequence

from qpeft.errors import OptionError
from qpeft.types import Passage


def titled_passages(texts: Sequence[str], titles: Sequence[str]) -> tuple[Passage, ...]:
    """Return passages whose ids are their positions, from 0.

    Raises:
        OptionError: there are titles, but not as many as passages.
    """
    if titles and len(titles) != len(texts):
        raise OptionError(f"{len(texts)} passages but {len(titles)} titles")
    pairs = zip(texts, titles or [""] * len(texts), strict=True)
    return tuple(Passage(str(index), text, title) for index, (text, title) in enumerate(pairs))
