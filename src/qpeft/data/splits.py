"""What the splits of all collections have in common."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from qpeft.errors import OptionError
from qpeft.types import Qrels, Query


def judged(queries: Mapping[str, Query], qrels: Qrels) -> dict[str, Query]:
    """Return the queries that have judgements, in the order of `queries`."""
    return {query_id: query for query_id, query in queries.items() if query_id in qrels}


def unknown_split(collection: str, split: str, known: Iterable[str]) -> OptionError:
    """Return the error for a split that a collection does not have; it names those that it has."""
    names = ", ".join(known)
    return OptionError(f"{collection} has no split {split!r}; " + (f"it has {names}" if names else "it has none"))
