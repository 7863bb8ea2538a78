"""What `push` and `pull` share: the model hub's failures as one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from qpeft.errors import ModelError


@contextmanager
def reaching(repo: str) -> Iterator[None]:
    """Turn whatever the hub's client raises into a ModelError; nothing else may stand within.

    The client lets the errors of its HTTP library through, and that library changes between its versions.
    """
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()) or "no reason given"
        kind = type(error).__name__
        raise ModelError(f"{repo!r} on the model hub cannot be reached: {kind}: {reason[:300]}") from error
