"""Progress on standard error: how far, how fast, how long still."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)


class Bar:
    """A running progress bar; `advance` says what was done."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task
        self._pairs = 0

    def advance(self, done: int = 1, pairs: int = 0) -> None:
        """Count what is finished, and the (query, passage) pairs that they took."""
        self._pairs += pairs
        elapsed = self._progress.tasks[self._task].elapsed or 0.0
        rate = f"{self._pairs / elapsed:,.0f} passages/s" if self._pairs and elapsed else ""
        self._progress.update(self._task, advance=done, rate=rate)


@contextmanager
def progress_bar(title: str, total: int, done: int = 0, unit: str = "queries") -> Iterator[Bar]:
    """Show a bar of `total` queries, or of something else, while the block runs."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield Bar(progress, progress.add_task(title, total=total, completed=done, rate=""))
