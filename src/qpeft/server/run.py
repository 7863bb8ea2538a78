"""Listening, signals and exit: accepted requests are answered before the server ends."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from collections.abc import Callable, Sequence
from types import FrameType

import uvicorn
from fastapi import FastAPI

from qpeft.errors import OptionError
from qpeft.server.connection import Connection
from qpeft.server.service import Service
from qpeft.server.settings import Settings

GRACE = 2
"""Seconds in which the last bytes of responses may leave after draining; requests that are open then get 503."""


class Server(uvicorn.Server):
    """uvicorn that first drains: while requests at hand are answered, new ones get 503, and then it ends with 0."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._loop = asyncio.get_running_loop()
        self._draining: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain on the first signal, drain no longer on the second."""
        self._loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        if self._draining is None:
            self._draining = asyncio.create_task(self._drain_and_exit())
        else:
            self.should_exit = True

    async def _drain_and_exit(self) -> None:
        await self._service.drain()
        self.should_exit = True


def listen(settings: Settings) -> socket.socket:
    """Return a listening socket.

    Raises:
        OptionError: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # With the protocol spelled out: asyncio turns Nagle's algorithm off only where it reads TCP here, and with it on,
    # a response waits 40 ms for the client's acknowledgement of its head.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((settings.host, settings.port))
        listening.listen(2048)
    except OSError as error:
        listening.close()
        raise OptionError(f"--host {settings.host} --port {settings.port}: {error.strerror or error}") from error
    return listening


def url_of(listening: socket.socket) -> str:
    """Return where a socket can be reached."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _allow_connections() -> None:
    """Let as many connections be open as the system allows: by default it is often 1,024, files included."""
    if sys.platform != "win32":
        import resource

        with contextlib.suppress(OSError, ValueError):
            allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
            resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, allowed))


def serve(app: FastAPI, settings: Settings, announce: Callable[[str, Sequence[str]], None]) -> None:
    """Serve until a signal comes.

    Args:
        app: the application.
        settings: options.
        announce: called with the URL and the served models once requests are taken.

    Raises:
        OptionError: the address cannot be had.
        QpeftError: the model cannot be opened.
    """
    service: Service = app.state.service
    _allow_connections()
    listening = listen(settings)
    config = uvicorn.Config(
        app,
        http=Connection,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=GRACE,
        lifespan="on",
    )

    async def run() -> None:
        server = Server(config, service)
        serving = asyncio.create_task(server.serve([listening]))
        settled = asyncio.create_task(service.settled.wait())
        await asyncio.wait({serving, settled}, return_when=asyncio.FIRST_COMPLETED)
        settled.cancel()
        if service.failure is not None:
            server.should_exit = True
        elif service.state == "ready":
            announce(url_of(listening), list(service.models.served))
        await serving

    asyncio.run(run())
    if service.failure is not None:
        raise service.failure
