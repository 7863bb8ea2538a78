"""The application: routes behind the guard, and how errors become responses."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from qpeft import server
from qpeft.errors import AdapterError, QpeftError, QueryError
from qpeft.lm.pretrained import PretrainedLM
from qpeft.server import page
from qpeft.server.batcher import OverloadedError
from qpeft.server.dialects.requests import of_tei
from qpeft.server.guard import DOCS_FILES, OPEN, Guard
from qpeft.server.models import UnknownModelError
from qpeft.server.ranking import NoReasonsError, TruncatedError
from qpeft.server.refusals import Refusal, of_fault, of_validation, response
from qpeft.server.routes import router
from qpeft.server.service import Service
from qpeft.server.settings import Settings


def create_app(settings: Settings, open_lm: Callable[[], PretrainedLM], keys: Sequence[str] = ()) -> FastAPI:
    """Return the application; `app.state.service` is its `Service`.

    Args:
        settings: options.
        open_lm: opens the language model, once the server runs.
        keys: those that requests must bear one of; none: everybody may ask.
    """
    service = Service(settings, open_lm)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await service.stop()

    app = FastAPIOffline(
        title="qpeft",
        version=version("qpeft"),
        description=server.__doc__ or "",
        lifespan=lifespan,
        redoc_url=None,
        static_url=DOCS_FILES,
    )
    app.state.service = service
    app.include_router(router)
    app.include_router(page.router)
    for kind in (Refusal, RequestValidationError, HTTPException, QpeftError, OverloadedError):
        app.add_exception_handler(kind, _failed)
    app.add_middleware(Guard, service=service, keys=keys, open_paths=OPEN | page.OPEN)
    if settings.cors_origin:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origin),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["Authorization", "Content-Type", "X-Request-ID"],
            expose_headers=["X-Request-ID", "Retry-After"],
        )
    return app


async def _failed(request: Request, error: Exception) -> Response:
    """Turn an error that is raised on purpose into a response in the request's dialect."""
    state = request.scope["state"]
    if request.url.path == "/rerank" and of_tei(getattr(error, "body", None)):
        state["dialect"] = "tei"
    return response(_refusal(error, state["request_id"]), state.get("dialect", "openai"), state["request_id"])


def _refusal(error: Exception, request_id: str) -> Refusal:
    match error:
        case Refusal():
            return error
        case RequestValidationError():
            return of_validation(error.errors(), error.body)
        case HTTPException():
            return Refusal(error.status_code, str(error.detail), headers=error.headers)
        case OverloadedError():
            return Refusal(429, str(error), headers={"Retry-After": str(error.retry_after)})
        case UnknownModelError():
            return Refusal(404, str(error), "model")
        case QueryError():
            return Refusal(422, str(error), "query")
        case TruncatedError():
            return Refusal(413, str(error), "truncate")
        case NoReasonsError():
            return Refusal(422, str(error), "explain")
        case AdapterError():
            return Refusal(409, str(error), "name")
    return of_fault(error, request_id)
