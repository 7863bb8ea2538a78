"""A real server around a tiny model, on a free port and in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from contextlib import contextmanager

import httpx2
import uvicorn

from qpeft.lm.causal import CausalLM
from qpeft.server.app import create_app
from qpeft.server.run import listen, url_of
from qpeft.server.settings import Settings

QUERY = "why is the sky blue?"
DOCUMENTS = [
    "the sea is salty",
    "the light of the sky is blue, and the air made the sky blue",
    "an octopus has three heart",
    "the old king of the city",
    "the tide of the sea and the moon",
]


class Watched(CausalLM):
    """Remembers the batches that it scored, and holds the next one back while `closed`.

    Rows that contain `poison`, a token id, are refused as a model with a fault would do.
    """

    def __init__(self, lm, poison=None):
        super().__init__(
            lm.model, lm.tokenizer, name=lm.name, max_length=lm.max_length, batch_tokens=4096, store=lm.store
        )
        self.poison = poison
        self.batches = []
        self.entered = threading.Semaphore(0)
        self._open = threading.Event()
        self._open.set()

    def close(self):
        """Hold the next batch back."""
        self._open.clear()

    def open(self):
        """Let batches through."""
        self._open.set()

    def log_probs(self, rows, *, adapters=None, **options):
        self.batches.append((list(rows), adapters))
        self.entered.release()
        assert self._open.wait(20)
        if any(self.poison in row.context for row in rows):
            raise RuntimeError("poison")
        return super().log_probs(rows, adapters=adapters, **options)

    def wait_for_batch(self):
        """Return once a batch has reached the model."""
        assert self.entered.acquire(timeout=20)

    def forget(self):
        """Forget the batches so far."""
        self.batches.clear()
        while self.entered.acquire(blocking=False):
            pass


@contextmanager
def running(open_lm, settings=None, keys=()):
    """Serve within this context; gives a client that knows its `app` and `server`."""
    settings = settings or Settings(port=0, max_wait_ms=0)
    app = create_app(settings, open_lm, keys)
    listening = listen(settings)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])))
    thread.start()
    client = httpx2.Client(base_url=url_of(listening), timeout=60, trust_env=False)
    client.app, client.server = app, server
    try:
        yield client
    finally:
        client.close()
        server.should_exit = True
        thread.join(60)
        listening.close()
        assert not thread.is_alive()


def wait_until(condition):
    """Return once a condition holds; the condition is what counts, not the time."""
    for _ in range(3000):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it never held")


@contextmanager
def ready(open_lm, settings=None, keys=()):
    """Serve, and wait until requests are taken."""
    with running(open_lm, settings, keys) as client:
        wait_until(lambda: client.app.state.service.state == "ready")
        yield client
