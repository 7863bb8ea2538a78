"""The server's state: loading, ready, draining; and the one way from what is asked to the answers."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any, Literal, TypeVar

from qpeft.lm.pretrained import PretrainedLM
from qpeft.server.batcher import Batcher
from qpeft.server.logs import log
from qpeft.server.metrics import Metrics
from qpeft.server.models import Models, ServedModel
from qpeft.server.ranking import MAX_EXPLAINED, Answer, Ask, rank
from qpeft.server.refusals import Refusal
from qpeft.server.settings import Settings

T = TypeVar("T")
State = Literal["loading", "ready", "draining", "failed"]


class Service:
    """What the routes share.

    Args:
        settings: options.
        open_lm: opens the language model; called in the model's thread.

    Attributes:
        state: requests are taken while it is `ready`.
        in_flight: requests that came whole and are being answered.
        failure: why the model could not be opened.
    """

    def __init__(self, settings: Settings, open_lm: Callable[[], PretrainedLM]) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.batcher = Batcher(
            self.metrics,
            batch_pairs=settings.max_batch_pairs,
            queue_pairs=settings.max_queue_pairs,
            max_wait=settings.max_wait_ms / 1000,
        )
        self.state: State = "loading"
        self.failure: Exception | None = None
        self.in_flight = 0
        self.settled = asyncio.Event()
        """Set once the model is open, or could not be opened."""
        self._open_lm = open_lm
        self._models: Models | None = None
        self._loading: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self.metrics.watch(lambda: self.state == "ready", self._cache)

    def start(self) -> None:
        """Open the model in the background, so that the server can already say that it is alive."""
        self.batcher.start()
        self._loading = asyncio.create_task(self._load(), name="load")

    async def stop(self) -> None:
        """Stop the model's thread."""
        if self._loading is not None:
            await asyncio.wait([self._loading])
        await self.batcher.close()

    async def drain(self) -> None:
        """Take no more requests, and return when all are answered or the time for it is over."""
        self.state = "draining"
        log("draining", in_flight=self.in_flight)
        ends = time.monotonic() + self.settings.drain_timeout
        while self.in_flight and time.monotonic() < ends:
            await asyncio.sleep(0.01)
        log("drained", left=self.in_flight)

    @property
    def models(self) -> Models:
        """The served models.

        Raises:
            Refusal: 503, while there are none or no more requests are taken.
        """
        if self.state != "ready" or self._models is None:
            raise Refusal(503, f"the server is {self.state}", headers={"Retry-After": "5"})
        return self._models

    async def answer(self, name: str | None, ask: Ask) -> tuple[ServedModel, list[Answer]]:
        """Return the model of a name, and its answers.

        Raises:
            Refusal: not ready, or too many documents.
            QpeftError, OverloadedError: as `ranking.rank`; UnknownModelError.
        """
        self._check(ask)
        model = self.models.find(name)
        with model.in_use():
            answers = await rank(self.batcher, model, ask)
        self.metrics.read(sum(each.tokens for each in answers), sum(each.truncated for each in answers))
        return model, answers

    async def load_adapter(self, name: str) -> ServedModel:
        """Open an adapter of the folder and serve it, in place of an older one of that name.

        Raises:
            Refusal: not ready.
            UnknownModelError, AdapterError: as `Models.open`.
        """
        models = self.models

        async def load() -> ServedModel:
            made = await self.batcher.run(lambda: models.open(name))
            before = models.serve(made)
            log("adapter loaded", model=made.name)
            if before is not None:
                await self._retire(before)
            return made

        return await self._to_the_end(load())

    async def drop_adapter(self, name: str) -> ServedModel:
        """Take an adapter out of service, and out of memory once its last request is answered.

        Raises:
            Refusal: not ready.
            UnknownModelError: it is not served.
        """
        dropped = self.models.drop(name)
        log("adapter dropped", model=dropped.name)
        await self._to_the_end(self._retire(dropped))
        return dropped

    async def _retire(self, model: ServedModel) -> None:
        await model.unused()
        if model.adapter is not None:
            await self.batcher.run(model.adapter.adapter.withdraw, always=True)

    async def _to_the_end(self, work: Coroutine[Any, Any, T]) -> T:
        """Await something that goes on if the client goes away, so that nothing is left half done."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)

    async def _load(self) -> None:
        started = time.monotonic()

        def load() -> Models:
            models = Models(self._open_lm(), self.settings)
            for _ in models.open_all():
                if self.state != "loading":  # the server is ending
                    break
            return models

        try:
            self._models = await self.batcher.run(load)
        except Exception as error:
            self.failure, self.state = error, "failed"
            log("model not opened", logging.ERROR, reason=str(error))
        else:
            if self.state == "loading":
                self.state = "ready"
                log("ready", models=list(self._models.served), seconds=round(time.monotonic() - started, 3))
        self.settled.set()

    def _check(self, ask: Ask) -> None:
        counts = [len(search.documents) for search in ask.searches]
        allowed = min(self.settings.max_documents, MAX_EXPLAINED if ask.explain else self.settings.max_documents)
        if max(counts) > allowed:
            what = "can be explained" if ask.explain else "are allowed"
            raise Refusal(413, f"{max(counts)} documents; at most {allowed} {what}", "documents")
        if sum(counts) > max(self.settings.max_queue_pairs, allowed):
            raise Refusal(413, f"{sum(counts)} documents in all; at most {self.settings.max_queue_pairs} are allowed")

    def _cache(self) -> tuple[int, int]:
        store = None if self._models is None else self._models.lm.store
        return (0, 0) if store is None else (store.hits, store.misses)
