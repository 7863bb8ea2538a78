"""The application: routes, and how errors become responses."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from qpeft.errors import AdapterError, InputError, QueryError
from qpeft.pretrained import LanguageModel
from qpeft.server import dialects
from qpeft.server.batcher import OverloadedError
from qpeft.server.guard import OPEN, Guard
from qpeft.server.logs import log
from qpeft.server.models import ServedModel, UnknownModelError
from qpeft.server.ranking import TruncatedError
from qpeft.server.refusals import JsonResponse, Refusal, of_validation, response
from qpeft.server.service import Service
from qpeft.server.settings import Settings

router = APIRouter()


def create_app(settings: Settings, open_lm: Callable[[], LanguageModel], keys: Sequence[str] = ()) -> FastAPI:
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

    app = FastAPI(
        title="qpeft",
        version=version("qpeft"),
        lifespan=lifespan,
        redoc_url=None,
        default_response_class=JsonResponse,
        description=(__import__("qpeft.server", fromlist=["server"]).__doc__ or ""),
    )
    app.state.service = service
    app.include_router(router)
    open_paths = set(OPEN)
    if importlib.util.find_spec("qpeft.server.page") is not None:
        page = importlib.import_module("qpeft.server.page").router
        app.include_router(page)
        open_paths |= {route.path for route in page.routes}
    for kind in (Refusal, RequestValidationError, HTTPException, InputError, AdapterError, OverloadedError, Exception):
        app.add_exception_handler(kind, _failed)
    if settings.cors_origin:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origin),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["Authorization", "Content-Type", "X-Request-ID"],
            expose_headers=["X-Request-ID", "Retry-After"],
        )
    app.add_middleware(Guard, service=service, keys=keys, open_paths=open_paths)
    return app


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


@router.post("/v1/rerank", tags=["rerank"])
async def rerank_v1(request: Request, body: dialects.RerankV1) -> Response:
    """Rank documents for a query: Cohere v1, Jina, vLLM."""
    model, (answer,) = await _service(request).answer(body.model, [body.search()])
    return JsonResponse(dialects.rerank_response(body, model.name, answer, "1"))


@router.post("/v2/rerank", tags=["rerank"])
async def rerank_v2(request: Request, body: dialects.RerankV2) -> Response:
    """Rank documents for a query: Cohere v2, vLLM."""
    model, (answer,) = await _service(request).answer(body.model, [body.search()])
    return JsonResponse(dialects.rerank_response(body, model.name, answer, "2"))


@router.post("/rerank", tags=["rerank"])
async def rerank(request: Request, body: dialects.AnyRerank) -> Response:
    """Rank documents for a query: TEI (`texts`), vLLM or infinity (`documents`)."""
    if isinstance(body, dialects.RerankTei):
        request.state.dialect = "tei"
        if not body.texts:
            raise Refusal(400, "`texts` cannot be empty", "texts")
        _, (answer,) = await _service(request).answer(body.model, [body.search()])
        return JsonResponse(dialects.tei_response(body, answer))
    model, (answer,) = await _service(request).answer(body.model, [body.search()])
    return JsonResponse(dialects.documents_response(body, model.name, answer))


@router.post("/v1/rerank/batch", tags=["rerank"])
async def rerank_batch(request: Request, body: dialects.RerankBatch) -> Response:
    """Rank documents for each of many queries."""
    model, answers = await _service(request).answer(body.model, body.searches())
    return JsonResponse(dialects.batch_response(body, model.name, answers))


@router.post("/score", tags=["rerank"])
async def score(request: Request, body: dialects.Score) -> Response:
    """Score pairs of texts: vLLM."""
    model, answers = await _service(request).answer(body.model, body.searches())
    return JsonResponse(dialects.score_response(model.name, answers))


@router.get("/health", tags=["server"])
async def health() -> dict[str, str]:
    """Say that the server is alive, whatever the model does."""
    return {"status": "ok"}


@router.get("/ready", tags=["server"])
async def ready(request: Request) -> dict[str, str]:
    """Say whether requests are taken: 503 before the model is loaded and warm, and while draining."""
    _service(request).models  # noqa: B018 — raises
    return {"status": "ready"}


@router.get("/info", tags=["server"])
async def info(request: Request) -> dict[str, Any]:
    """Describe the server as TEI does, and what it holds."""
    service = _service(request)
    models, settings = service.models, service.settings
    return {
        "model_id": models.base,
        "model_sha": models.lm.revision,
        "model_dtype": models.lm.dtype,
        "model_type": {"reranker": {"id2label": {"0": "relevant"}, "label2id": {"relevant": 0}}},
        "max_concurrent_requests": settings.max_queue_pairs,
        "max_input_length": models.lm.max_length,
        "max_batch_tokens": settings.max_batch_pairs * models.lm.max_length,
        "max_batch_requests": settings.max_batch_pairs,
        "max_client_batch_size": settings.max_documents,
        "auto_truncate": True,
        "tokenization_workers": 1,
        "version": version("qpeft"),
        "device": str(models.lm.device),
        "models": list(models.served),
        "adapters_available": sorted(models.available()),
    }


@router.get("/v1/models", tags=["models"])
async def list_models(request: Request) -> dict[str, Any]:
    """List what `model` may be: the base, and BASE:ADAPTER."""
    models = _service(request).models
    return {"object": "list", "data": [_card(model, models.base) for model in models.served.values()]}


@router.post("/v1/adapters/{name}", tags=["models"])
async def load_adapter(request: Request, name: str) -> dict[str, Any]:
    """Open an adapter of the folder of adapters, or open it anew."""
    service = _service(request)
    return _card(await service.load_adapter(name), service.models.base)


@router.delete("/v1/adapters/{name}", tags=["models"])
async def drop_adapter(request: Request, name: str) -> dict[str, Any]:
    """Take an adapter out of service; its requests at hand are answered first."""
    dropped = await _service(request).drop_adapter(name)
    return {"id": dropped.name, "object": "model", "deleted": True}


@router.get("/metrics", tags=["server"])
async def metrics(request: Request) -> Response:
    """Return Prometheus metrics."""
    return Response(_service(request).metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _card(model: ServedModel, base: str) -> dict[str, Any]:
    card: dict[str, Any] = {"id": model.name, "object": "model", "created": model.created, "owned_by": "qpeft"}
    card |= {"root": base, "parent": None if model.adapter is None else base}
    if model.adapter is not None:
        card["adapter"] = {"kind": model.adapter.name, "sha256": model.adapter.sha256}
    return card


async def _failed(request: Request, error: Exception) -> Response:
    """Turn any error into a response in the request's dialect; what is not the client's fault is logged."""
    state = request.scope["state"]
    body = getattr(error, "body", None)
    if request.url.path == "/rerank" and isinstance(body, dict) and "texts" in body:
        state["dialect"] = "tei"
    refusal = _refusal(error, state["request_id"])
    if refusal.status == 500:
        log("failed", logging.ERROR, id=state["request_id"], exception=error)
    return response(refusal, state.get("dialect", "openai"), state["request_id"])


def _refusal(error: Exception, request_id: str) -> Refusal:
    if isinstance(error, Refusal):
        return error
    if isinstance(error, RequestValidationError):
        return of_validation(error.errors(), error.body)
    if isinstance(error, HTTPException):
        return Refusal(error.status_code, str(error.detail), headers=error.headers)
    if isinstance(error, OverloadedError):
        return Refusal(429, str(error), headers={"Retry-After": str(error.retry_after)})
    if isinstance(error, UnknownModelError):
        return Refusal(404, str(error), "model")
    if isinstance(error, QueryError):
        return Refusal(422, str(error), "query")
    if isinstance(error, TruncatedError):
        return Refusal(413, str(error), "truncate")
    if isinstance(error, AdapterError):
        return Refusal(409, str(error), "name")
    return Refusal(500, f"internal error; the log has more under {request_id}")
