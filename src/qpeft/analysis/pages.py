"""Pages from the templates beside this file: no network, no scripts, readable on light and dark."""

from __future__ import annotations

from typing import Any

import jinja2


def render(template: str, context: dict[str, Any], **names: Any) -> str:
    """Return a page.

    Args:
        template: its file.
        context: what it shows.
        names: functions and constants that its macros use as well.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("qpeft", "analysis"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= names
    return environment.get_template(template).render(context)
