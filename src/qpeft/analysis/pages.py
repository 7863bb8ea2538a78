"""Pages from the templates beside this file: no network, no scripts, readable on light and dark."""

from __future__ import annotations

import json
from typing import Any

import jinja2


def render(template: str, context: dict[str, Any], **names: Any) -> str:
    """Return a page.

    Args:
        template: its file.
        context: what it shows; `title` is its heading.
        names: functions and constants that its macros use as well.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("qpeft", "analysis"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"as_text": _as_text, **names}
    return environment.get_template(template).render(context)


def _as_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, indent=2, default=str)
