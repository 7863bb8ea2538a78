"""Logs as JSON lines on standard error: never a header, a body or a key."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

logger = logging.getLogger("qpeft.server")


class JsonLines(logging.Formatter):
    """One object a line; an exception's traceback is a field of it."""

    def format(self, record: logging.LogRecord) -> str:
        """Return a record as JSON."""
        facts: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            facts["traceback"] = self.formatException(record.exc_info)
        return json.dumps(facts)


def log(event: str, level: int = logging.INFO, *, exception: BaseException | None = None, **facts: Any) -> None:
    """Write a line with an event's name and its facts."""
    logger.log(level, event, exc_info=exception, extra={"facts": facts})


@contextmanager
def on_stderr() -> Iterator[None]:
    """Send this package's logs, and warnings of uvicorn and asyncio, to standard error within this context."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    levels = {"qpeft.server": logging.INFO, "uvicorn": logging.WARNING, "asyncio": logging.WARNING}
    loggers = [logging.getLogger(name) for name in levels]
    before = [(each.handlers, each.propagate, each.level) for each in loggers]
    for each, level in zip(loggers, levels.values(), strict=True):
        each.handlers, each.propagate = [handler], False
        each.setLevel(level)
    try:
        yield
    finally:
        for each, (handlers, propagate, level) in zip(loggers, before, strict=True):
            each.handlers, each.propagate = handlers, propagate
            each.setLevel(level)
