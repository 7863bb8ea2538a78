"""One queue for all requests: pairs of many of them, and of many adapters, go through the model in one batch.

All bookkeeping happens in the event loop, without locks; one thread does whatever touches the model. Requests take
turns by chunks of pairs, so that a short one need not wait for the end of a long one.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar

from qpeft import memory
from qpeft.methods._rows import RowScorer, Work
from qpeft.server.metrics import Metrics
from qpeft.types import Passage, Query

Pair = tuple[Query, Passage]
T = TypeVar("T")
MAX_CALLS = 32
"""Explanations, and adapters to load or drop, that may wait."""


class OverloadedError(Exception):
    """The queue is full; `retry_after` is in seconds."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the queue is full; try again in {retry_after} s")
        self.retry_after = retry_after


@dataclass(frozen=True, slots=True)
class Scored:
    """For each of some pairs: the score in nats (−∞: unreadable), tokens that the model read, whether it was cut."""

    scores: list[float]
    tokens: list[int]
    truncated: list[bool]

    def part(self, start: int, end: int) -> Scored:
        """Return some consecutive pairs."""
        return Scored(self.scores[start:end], self.tokens[start:end], self.truncated[start:end])


@dataclass(eq=False, slots=True)
class Job:
    """The pairs of one request and one model; `taken` have left the queue."""

    scorer: RowScorer
    pairs: Sequence[Pair]
    max_passage_tokens: int | None
    future: asyncio.Future[Scored]
    arrived: float
    taken: int = 0
    parts: list[Scored] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive pairs of a job."""

    job: Job
    pairs: Sequence[Pair]


class Batcher:
    """Collects pairs and has them scored.

    Args:
        metrics: counts batches.
        batch_pairs: pairs in a batch.
        queue_pairs: pairs that may wait; a request that finds the queue empty is always taken.
        max_wait: seconds that a request waits for company while the model is idle.
    """

    def __init__(self, metrics: Metrics, *, batch_pairs: int, queue_pairs: int, max_wait: float) -> None:
        self._metrics = metrics
        self._batch_pairs, self._queue_pairs, self._max_wait = batch_pairs, queue_pairs, max_wait
        self._chunk = max(1, batch_pairs // 2)
        self._waiting: deque[Job] = deque()
        self._thread = ThreadPoolExecutor(1, "qpeft-model")
        self._changed = asyncio.Event()
        self._alone = asyncio.Lock()
        self._calls = 0
        self._worker: asyncio.Task[None] | None = None
        self._pairs_per_second = 0.0
        self.queued = 0

    def start(self) -> None:
        """Begin to take jobs; needs a running event loop."""
        self._worker = asyncio.create_task(self._work(), name="batcher")

    async def close(self) -> None:
        """Stop after the batch at hand; whatever waits is cancelled."""
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.wait([self._worker])
        for job in self._waiting:
            job.future.cancel()
        await asyncio.get_running_loop().run_in_executor(None, self._thread.shutdown)

    async def score(self, scorer: RowScorer, pairs: Sequence[Pair], max_passage_tokens: int | None = None) -> Scored:
        """Return the raw scores of pairs, in order. A cancelled call leaves the queue.

        Raises:
            OverloadedError: the queue is full.
            QueryError: a query is empty or leaves no room for a passage.
        """
        if self.queued and self.queued + len(pairs) > self._queue_pairs:
            raise OverloadedError(self._retry_after())
        loop = asyncio.get_running_loop()
        job = Job(scorer, pairs, max_passage_tokens, loop.create_future(), loop.time())
        self._waiting.append(job)
        self._count(len(pairs))
        self._changed.set()
        try:
            return await job.future
        finally:
            self._leave(job)

    async def run(self, function: Callable[[], T], *, always: bool = False) -> T:
        """Call a function in the model's thread, between two batches; such calls and batches take turns.

        Args:
            function: what is called.
            always: do not refuse, however many wait.

        Raises:
            OverloadedError: too many wait.
        """
        if self._calls >= MAX_CALLS and not always:
            raise OverloadedError(self._retry_after())
        self._calls += 1
        try:
            async with self._alone:
                return await asyncio.get_running_loop().run_in_executor(self._thread, function)
        finally:
            self._calls -= 1

    def _count(self, pairs: int) -> None:
        self.queued += pairs
        self._metrics.queued.set(self.queued)

    def _leave(self, job: Job) -> None:
        if job in self._waiting:
            self._waiting.remove(job)
            self._count(job.taken - len(job.pairs))

    def _retry_after(self) -> int:
        seconds = self.queued / self._pairs_per_second if self._pairs_per_second else 1.0
        return min(60, max(1, math.ceil(seconds)))

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        given_back = loop.time()
        while True:
            await self._company()
            chunks = self._take()
            started = time.perf_counter()
            outcomes: Sequence[Scored | Exception]
            try:
                outcomes = await loop.run_in_executor(self._thread, score_chunks, chunks)
            except Exception as error:  # whatever it is, the next batch is to be scored
                outcomes = [error] * len(chunks)
            pairs = sum(len(chunk.pairs) for chunk in chunks)
            self._pairs_per_second = pairs / max(1e-6, time.perf_counter() - started)
            self._metrics.batch(pairs, self._batch_pairs)
            for chunk, outcome in zip(chunks, outcomes, strict=True):
                self._deliver(chunk.job, outcome)
            if loop.time() - given_back > memory.EVERY:
                await loop.run_in_executor(self._thread, memory.give_back)
                given_back = loop.time()

    async def _company(self) -> None:
        """Wait for a full batch, or until somebody has waited long enough."""
        while True:
            self._changed.clear()
            if self.queued >= self._batch_pairs:
                return
            left = None
            if self._waiting:
                oldest = min(job.arrived for job in self._waiting)
                left = oldest + self._max_wait - asyncio.get_running_loop().time()
                if left <= 0:
                    return
            with suppress(TimeoutError):  # by then, who waited may have left
                await asyncio.wait_for(self._changed.wait(), left)

    def _take(self) -> list[Chunk]:
        """Take a batch from the queue, a chunk of each job in turn."""
        chunks: list[Chunk] = []
        room = self._batch_pairs
        while room and self._waiting:
            job = self._waiting.popleft()
            count = min(room, self._chunk, len(job.pairs) - job.taken)
            chunks.append(Chunk(job, job.pairs[job.taken : job.taken + count]))
            job.taken += count
            room -= count
            self._count(-count)
            if job.taken < len(job.pairs):
                self._waiting.append(job)
        return chunks

    def _deliver(self, job: Job, outcome: Scored | Exception) -> None:
        if job.future.done():
            return
        if isinstance(outcome, Exception):
            job.future.set_exception(outcome)
            self._leave(job)
            return
        job.parts.append(outcome)
        if sum(len(part.scores) for part in job.parts) == len(job.pairs):
            job.future.set_result(
                Scored(
                    [score for part in job.parts for score in part.scores],
                    [tokens for part in job.parts for tokens in part.tokens],
                    [cut for part in job.parts for cut in part.truncated],
                )
            )


def score_chunks(chunks: Sequence[Chunk]) -> list[Scored | Exception]:
    """Score chunks of several jobs in one call of the model for each kind of scorer.

    If that fails, one by one, so that only one's own fail.
    """
    outcomes: list[Scored | Exception | None] = []
    works: list[tuple[int, Work]] = []
    kinds: dict[int, Hashable] = {}
    for place, chunk in enumerate(chunks):
        try:
            work = chunk.job.scorer.prepare(chunk.pairs, chunk.job.max_passage_tokens)
            kinds[place] = chunk.job.scorer.kind
        except Exception as error:
            outcomes.append(error)
        else:
            outcomes.append(None)
            works.append((place, work))
    for kind in dict.fromkeys(kinds.values()):
        for place, outcome in _model(chunks, [work for work in works if kinds[work[0]] == kind]):
            outcomes[place] = outcome
    return [outcome for outcome in outcomes if outcome is not None]


def _model(chunks: Sequence[Chunk], works: Sequence[tuple[int, Work]]) -> list[tuple[int, Scored | Exception]]:
    rows = [row for _, work in works for row in work.rows]
    adapters = [chunks[place].job.scorer.adapter for place, work in works for _ in work.rows]
    try:
        values = iter(chunks[works[0][0]].job.scorer.values(rows, adapters))
        done: list[tuple[int, Scored | Exception]] = []
        for place, work in works:
            scores = chunks[place].job.scorer.pool(work, [next(values) for _ in work.rows])
            scored = Scored(scores, [0] * work.pairs, [False] * work.pairs)
            for owner, row in zip(work.owners, work.rows, strict=True):
                scored.tokens[owner] += len(row)
                scored.truncated[owner] |= row.truncated
            done.append((place, scored))
        return done
    except Exception as error:
        if len(works) == 1:
            return [(works[0][0], error)]
        return [outcome for work in works for outcome in _model(chunks, [work])]
