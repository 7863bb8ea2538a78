"""What stands before every route: request ids, keys, the size of bodies, clients that go away, time-outs, logs.

Plain ASGI, because it has to act on a body before it is read, and on a connection after that.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import logging
import os
import re
import time
import uuid
from collections.abc import Collection, Sequence
from pathlib import Path

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qpeft.errors import FormatError, InputError, OptionError
from qpeft.server.logs import log
from qpeft.server.refusals import Refusal, of_fault, response
from qpeft.server.service import Service

KEYS_VARIABLE = "QPEFT_API_KEYS"
GONE = 499
"""What logs and metrics say of a request whose client went away before there was a response."""
PROBES = frozenset({"/health", "/ready", "/metrics"})
"""Are asked so often that their success is not worth a line."""
DOCS_FILES = "/docs-files"
"""Where what `/docs` is made of is served: on machines without the internet it is wanted too."""
OPEN = frozenset({
    "/health", "/ready", "/docs", "/openapi.json",
    *(f"{DOCS_FILES}/{name}" for name in ("swagger-ui-bundle.js", "swagger-ui.css", "favicon.png")),
})  # fmt: skip
"""Need no key: probes have none, and the documentation is no secret."""


def read_keys(file: str | None) -> list[str]:
    """Return the keys of a file, one a line, and those of the environment.

    Raises:
        InputError: the file cannot be read.
        FormatError: a key is not printable ASCII, or the file has none.
        OptionError: the environment's variable is set, but has none.
    """
    given = os.environ.get(KEYS_VARIABLE)
    keys = [key.strip() for key in (given or "").split(",") if key.strip()]
    if given is not None and not keys:
        raise OptionError(f"{KEYS_VARIABLE} is set but has no key; unset it if everybody may ask")
    if file is not None:
        try:
            lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--api-key-file {file}: {error}") from error
        found = [(number, line.strip()) for number, line in enumerate(lines, start=1)]
        found = [(number, line) for number, line in found if line and not line.startswith("#")]
        for number, line in found:
            if not re.fullmatch(r"[\x21-\x7e]+", line):
                raise FormatError(file, number, "a key is printable ASCII without blanks")
        if not found:
            raise FormatError(file, None, "no keys")
        keys += [line for _, line in found]
    return keys


class Keys:
    """Whether a request bears a key; every key is compared, in constant time."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def allow(self, scope: Scope) -> bool:
        """Return whether the header `Authorization: Bearer KEY` has one of the keys, or none is needed."""
        if not self._digests:
            return True
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        kind, _, key = given.partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        matches = [hmac.compare_digest(digest, each) for each in self._digests]
        return kind.lower() == b"bearer" and any(matches)


class Guard:
    """The outermost layer but for CORS, which answers what browsers ask ahead.

    Args:
        app: what it guards.
        service: state, limits, metrics.
        keys: those that are accepted; none: everybody is.
        open_paths: paths that need no key.
    """

    def __init__(self, app: ASGIApp, service: Service, keys: Sequence[str], open_paths: Collection[str]) -> None:
        self._app, self._service, self._keys = app, service, Keys(keys)
        self._open = frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        request_id = scope.setdefault("state", {})["request_id"] = _request_id(scope)
        status = GONE

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self._guarded(scope, receive, sending)
        except asyncio.CancelledError:
            if self._service.state != "draining":
                raise
            if status == GONE:  # the time for draining is over
                await _refuse(scope, receive, sending, Refusal(503, "the server is ending"))
        finally:
            seconds = time.perf_counter() - started
            route = getattr(scope.get("route"), "path", "none")
            self._service.metrics.request(route, status, seconds)
            facts = {"method": scope["method"], "path": scope["path"][:200], "status": status}
            level = logging.DEBUG if status == 200 and scope["path"] in PROBES else logging.INFO
            log("request", level, id=request_id, **facts, ms=round(1000 * seconds, 1))

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        settings = self._service.settings
        try:
            if scope["path"] not in self._open and scope["method"] != "OPTIONS" and not self._keys.allow(scope):
                raise Refusal(401, "a key is needed: Authorization: Bearer KEY", headers={"WWW-Authenticate": "Bearer"})
            async with asyncio.timeout(settings.request_timeout):
                body = await _body(scope, receive, int(settings.max_body_mib * 2**20))
        except Refusal as refusal:
            await _refuse(scope, receive, send, refusal)
            return
        except TimeoutError:
            await _refuse(scope, receive, send, Refusal(408, "the body did not come in time"))
            return
        if body is None:
            return
        self._service.in_flight += 1  # from now on: a body that does not come must not hold up the end
        try:
            await self._run(scope, body, receive, send)
        finally:
            self._service.in_flight -= 1

    async def _run(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Run the route, but no longer than the client is there, and than a request may take."""
        sent = False

        async def sending(message: Message) -> None:
            nonlocal sent
            sent = True
            await send(message)

        given = False
        over = asyncio.Event()

        async def receiving() -> Message:
            nonlocal given
            if not given:
                given = True
                return {"type": "http.request", "body": body, "more_body": False}
            await over.wait()
            return {"type": "http.disconnect"}

        work = asyncio.ensure_future(self._app(scope, receiving, sending))
        gone = asyncio.ensure_future(_disconnect(receive))
        try:
            await asyncio.wait(
                {work, gone}, timeout=self._service.settings.request_timeout, return_when=asyncio.FIRST_COMPLETED
            )
            late = not work.done() and not gone.done()
        finally:
            over.set()
            gone.cancel()
            if not work.done():
                work.cancel()
            await asyncio.wait({work, gone})
        if late and not sent:
            seconds = self._service.settings.request_timeout
            await _refuse(scope, receive, send, Refusal(504, f"not done within {seconds:g} s"))
        elif not work.cancelled() and (error := work.exception()) is not None:
            refusal = of_fault(error, scope["state"]["request_id"])
            if not sent:
                await _refuse(scope, receive, send, refusal)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _body(scope: Scope, receive: Receive, limit: int) -> bytes | None:
    """Return the whole body, or None if the client went away.

    Raises:
        Refusal: it is, or says that it is, larger than the limit.
    """
    too_large = Refusal(413, f"the body is larger than {limit} bytes", headers={"Connection": "close"})
    headers = dict(scope["headers"])
    if int(headers.get(b"content-length", 0)) > limit:
        if b"expect" not in headers:  # such a client sends its body only once it is asked for
            await _discard(receive)
        raise too_large
    pieces: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        piece = message.get("body", b"")
        pieces.append(piece)
        size += len(piece)
        if size > limit:
            await _discard(receive)
            raise too_large
        if not message.get("more_body"):
            return b"".join(pieces)


async def _discard(receive: Receive) -> None:
    """Read on for a moment: a connection that is closed over unread data is reset, and the response lost."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(1):
            while (message := await receive())["type"] == "http.request" and message.get("more_body"):
                pass


async def _refuse(scope: Scope, receive: Receive, send: Send, refusal: Refusal) -> None:
    state = scope["state"]
    await response(refusal, state.get("dialect", "openai"), state["request_id"])(scope, receive, send)


def _request_id(scope: Scope) -> str:
    """Return the client's id if it is harmless, else a new one."""
    given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
    return given.decode() if re.fullmatch(rb"[A-Za-z0-9._-]{1,128}", given) else uuid.uuid4().hex
