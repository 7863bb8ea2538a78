"""The routes. Each hands what is asked to the service and words the answers."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated, Any

from fastapi import APIRouter, Body, Request
from starlette.responses import Response

from qpeft.server.dialects import requests, responses
from qpeft.server.models import ServedModel
from qpeft.server.refusals import Problem, Refusal, TeiProblem
from qpeft.server.service import Service

REFUSED: dict[int | str, dict[str, Any]] = {
    400: {"model": Problem, "description": "No JSON"},
    401: {"model": Problem, "description": "No key, or not one of the keys"},
    404: {"model": Problem, "description": "No such model"},
    408: {"model": Problem, "description": "The body did not come in time"},
    413: {"model": Problem, "description": "Too many documents, or too large a body"},
    422: {"model": Problem, "description": "A field is missing or wrong; `error.param` names it"},
    429: {"model": Problem, "description": "The queue is full; `Retry-After` says when to try again"},
    500: {"model": Problem, "description": "A fault of the server; its log has more under `id`"},
    503: {"model": Problem, "description": "Not ready yet, or draining"},
    504: {"model": Problem, "description": "Not done in time"},
}
REFUSED_BY_TEI = {status: {**facts, "model": Problem | TeiProblem} for status, facts in REFUSED.items()}
QUERY = "why is the sky blue"
DOCUMENTS = ["Air scatters short waves more.", {"title": "Sea", "text": "The sea is salty."}]

router = APIRouter()
ranks = APIRouter(tags=["rerank"], responses=REFUSED)
models = APIRouter(tags=["models"], responses={status: REFUSED[status] for status in (401, 404, 429, 503)})


def service_of(request: Request) -> Service:
    """Return the state that routes share."""
    service: Service = request.app.state.service
    return service


def _example(**fields: Any) -> Any:
    return Body(openapi_examples={"two documents": {"value": fields}})


@ranks.post("/v1/rerank", response_model_exclude_none=True)
async def rerank_v1(
    request: Request, body: Annotated[requests.RerankV1, _example(query=QUERY, documents=DOCUMENTS)]
) -> responses.Reranked:
    """Rank documents for a query: Cohere v1, Jina, vLLM."""
    model, (answer,) = await service_of(request).answer(body.model, body.ask())
    return responses.reranked(body, model.name, answer)


@ranks.post("/v2/rerank", response_model_exclude_none=True)
async def rerank_v2(
    request: Request, body: Annotated[requests.RerankV2, _example(query=QUERY, documents=DOCUMENTS)]
) -> responses.Reranked:
    """Rank documents for a query: Cohere v2, vLLM."""
    model, (answer,) = await service_of(request).answer(body.model, body.ask())
    return responses.reranked(body, model.name, answer)


@ranks.post("/rerank", response_model_exclude_none=True, responses=REFUSED_BY_TEI)
async def rerank(
    request: Request, body: Annotated[requests.AnyRerank, _example(query=QUERY, texts=["Air scatters.", "Salt."])]
) -> list[responses.TeiRank] | responses.RerankedDocuments:
    """Rank documents for a query: TEI by its `texts`; by its `documents` vLLM, or infinity with `raw_scores`."""
    if isinstance(body, requests.RerankTei):
        request.scope["state"]["dialect"] = "tei"
        if not body.texts:
            raise Refusal(400, "`texts` cannot be empty", "texts")
        _, (answer,) = await service_of(request).answer(body.model, body.ask())
        return responses.tei_ranks(body, answer)
    name = None if body.model == requests.UNSPECIFIED else body.model
    model, (answer,) = await service_of(request).answer(name, body.ask())
    return responses.reranked_documents(body, model.name, answer)


@ranks.post("/v1/rerank/batch", response_model_exclude_none=True)
async def rerank_batch(
    request: Request,
    body: Annotated[requests.RerankBatch, _example(queries=[{"query": QUERY, "documents": DOCUMENTS}])],
) -> responses.RerankedBatch:
    """Rank the documents of each of many queries."""
    model, answers = await service_of(request).answer(body.model, body.ask())
    return responses.reranked_batch(body, model.name, answers)


@ranks.post("/score")
async def score(
    request: Request, body: Annotated[requests.Score, _example(text_1=QUERY, text_2=["Air scatters.", "Salt."])]
) -> responses.Scores:
    """Score pairs of texts: vLLM."""
    model, answers = await service_of(request).answer(body.model, body.ask())
    return responses.scores(model.name, answers)


@models.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    """List what `model` may be: the base, and BASE:ADAPTER."""
    served = service_of(request).models
    return {"object": "list", "data": [_card(model, served.base) for model in served.served.values()]}


@models.post("/v1/adapters/{name}", responses={409: {"model": Problem, "description": "It does not fit the model"}})
async def load_adapter(request: Request, name: str) -> dict[str, Any]:
    """Open an adapter of the folder of adapters, anew if it is served already."""
    service = service_of(request)
    return _card(await service.load_adapter(name), service.models.base)


@models.delete("/v1/adapters/{name}")
async def drop_adapter(request: Request, name: str) -> dict[str, Any]:
    """Take an adapter out of service; the requests that use it are answered first."""
    dropped = await service_of(request).drop_adapter(name)
    return {"id": dropped.name, "object": "model", "deleted": True}


@router.get("/health", tags=["server"])
@router.head("/health", include_in_schema=False)
async def health() -> dict[str, str]:
    """Say that the server is alive, whatever the model does."""
    return {"status": "ok"}


@router.get("/ready", tags=["server"], responses={503: REFUSED[503]})
@router.head("/ready", include_in_schema=False)
async def ready(request: Request) -> dict[str, str]:
    """Say whether requests are taken: 503 until the model is open and warm, and while draining."""
    service_of(request).models  # noqa: B018 — raises
    return {"status": "ready"}


@router.get("/info", tags=["server"], responses={status: REFUSED[status] for status in (401, 503)})
async def info(request: Request) -> dict[str, Any]:
    """Describe the server as TEI does, and what it holds."""
    service = service_of(request)
    served, settings = service.models, service.settings
    return {
        "model_id": served.base,
        "model_sha": served.lm.revision,
        "model_dtype": served.lm.dtype,
        "model_type": {"reranker": {"id2label": {"0": "relevant"}, "label2id": {"relevant": 0}}},
        "max_concurrent_requests": settings.max_queue_pairs,
        "max_input_length": served.lm.max_length,
        "max_batch_tokens": settings.max_batch_pairs * served.lm.max_length,
        "max_batch_requests": settings.max_batch_pairs,
        "max_client_batch_size": settings.max_documents,
        "auto_truncate": True,
        "tokenization_workers": 1,
        "version": version("qpeft"),
        "device": str(served.lm.device),
        "models": list(served.served),
        "adapters_available": sorted(served.available()),
    }


@router.get("/metrics", tags=["server"], response_class=Response, responses={401: REFUSED[401]})
async def metrics(request: Request) -> Response:
    """Return what was counted, for Prometheus."""
    return Response(service_of(request).metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


router.include_router(ranks)
router.include_router(models)


def _card(model: ServedModel, base: str) -> dict[str, Any]:
    """Return what OpenAI's list says of a model, and vLLM's of an adapter."""
    card: dict[str, Any] = {"id": model.name, "object": "model", "created": model.created, "owned_by": "qpeft"}
    card |= {"root": base, "parent": None if model.adapter is None else base}
    card["method"] = model.method
    if model.adapter is not None:
        card["adapter"] = {"kind": model.adapter.name, "sha256": model.adapter.sha256}
    if model.calibration is not None:
        card["calibration"] = {"method": model.calibration.method, "centred": model.calibration.centred}
    return card
