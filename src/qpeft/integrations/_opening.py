"""The first argument of all integrations: a ready reranker, or the name of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qpeft.errors import OptionError
from qpeft.types import Reranker


def open_reranker(model: str | Reranker, options: Mapping[str, Any]) -> Reranker:
    """Return a ready reranker as it is, or open one.

    Raises:
        ModelError: the model cannot be opened.
        OptionError: an unknown option, or options beside a ready reranker.
    """
    if isinstance(model, str):
        return Reranker.from_pretrained(model, **options)
    if options:
        raise OptionError(f"{min(options)!r} is an option of opening a model, but the reranker is ready")
    return model
