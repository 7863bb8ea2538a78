"""Makes PEFT know the type QPEFT, so that it can read what an adapter folder says.

PEFT's own registration takes no types but its own. Its tables are dictionaries by name, though, and from 0.21 on
nothing but those tables is asked. What PEFT cannot do is apply such an adapter: its models write a prompt without
seeing query and passage. So opening one there ends in an error that says how to open it here.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from qpeft.errors import MissingDependencyError, ModelError

NAME = "QPEFT"


def register() -> None:
    """Enter the type into PEFT's tables; once is enough, again does no harm.

    Raises:
        MissingDependencyError: PEFT is not installed.
        ModelError: this version of PEFT has no such tables.
    """
    try:
        import peft
    except ImportError as error:
        raise MissingDependencyError("peft", "lora") from error
    tables = [getattr(peft.mapping, f"PEFT_TYPE_TO_{kind}_MAPPING", None) for kind in ("CONFIG", "TUNER", "PREFIX")]
    if not all(isinstance(table, dict) for table in tables):
        raise ModelError(f"peft {peft.__version__} cannot be told of other adapter types; version 0.21 can")
    entries: tuple[Any, ...] = (_config(peft.PeftConfig), _Elsewhere, "qpeft_")
    for table, entry in zip(tables, entries, strict=True):
        table.setdefault(NAME, entry)  # type: ignore[union-attr]


def _config(base: type[Any]) -> type[Any]:
    """Return the class of PEFT's configurations for this type; its fields are the entries of `adapter_config.json`."""
    kinds = {"adapter": str, "options": dict, "template": dict, "max_passage_tokens": int}
    kinds |= {"method": str, "method_options": dict, "head": bool, "trained_parameters": int, "base": dict}
    fields = [(name, kind | None, dataclasses.field(default=None)) for name, kind in kinds.items()]
    return dataclasses.make_dataclass("QPeftConfig", fields, bases=(base,))


class _Elsewhere:
    """Stands where PEFT looks for what applies an adapter."""

    def __init__(self, *args: Any, **options: Any) -> None:
        raise ModelError("open this adapter with qpeft.Reranker.from_pretrained(model, adapter=folder)")
