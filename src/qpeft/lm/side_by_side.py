"""Batches side by side on a CPU: each in a thread of its own that computes with few threads, or one.

The operations of a small model are too short to be shared out among many threads: much of the time goes into waiting
for each other at the end of every one of them. Two batches with one thread each take much less than one after the
other with two threads each (docs/performance.md).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

MOST = 4
"""Batches at once. Python itself runs one thread at a time, so that many would wait for it."""

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class SideBySide:
    """Threads that share those of torch evenly; made when they are first needed, and again when torch's number changes.

    One caller at a time.
    """

    def __init__(self) -> None:
        self._threads = 0
        self._pool: ThreadPoolExecutor | None = None
        self._own = threading.local()

    @staticmethod
    def width() -> int:
        """Return how many batches run at once."""
        return min(torch.get_num_threads(), MOST)

    @property
    def is_inside(self) -> bool:
        """Whether the calling thread is one of these."""
        return getattr(self._own, "inside", False)

    def run(self, work: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
        """Return the results in order; an error of one item is raised once those that have begun are done."""
        pool = self._ready()
        futures: list[Future[_Result]] = [pool.submit(work, item) for item in items]
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()
            wait(futures)

    def _ready(self) -> ThreadPoolExecutor:
        threads, width = torch.get_num_threads(), self.width()
        if self._pool is not None and self._threads == threads:
            return self._pool
        if self._pool is not None:
            self._pool.shutdown()
        together = threading.Barrier(width)

        def begin() -> None:
            self._own.inside = True
            torch.get_num_threads()  # else the first operation would set this thread's number to that of all
            torch.set_num_threads(threads // width)  # of this thread; but threads made later would start with it
            together.wait()

        self._pool = ThreadPoolExecutor(width, "batch", begin)
        wait([self._pool.submit(lambda: None) for _ in range(width)])
        torch.set_num_threads(threads)
        self._threads = threads
        return self._pool
