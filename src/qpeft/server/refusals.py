"""Errors as each dialect words them.

TEI has `{"error", "error_type"}`. The others get OpenAI's `{"error": {"message", "type", "param", "code"}}`, which vLLM
and infinity speak, and beside it Cohere's `message` and Jina's `detail`: clients of theirs fail without it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel
from starlette.responses import Response

from qpeft.server.dialects.requests import field_of
from qpeft.server.logs import log

Dialect = Literal["openai", "tei"]

TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "internal_error",
    503: "unavailable_error",
    504: "timeout_error",
}
"""The rest is `invalid_request_error`."""
TEI_TYPES = {400: "Empty", 429: "Overloaded", 500: "Backend", 503: "Unhealthy", 504: "Overloaded"}
"""The rest is `Validation`, which is how TEI calls whatever the client could have known."""


class OpenAiError(BaseModel):
    """What went wrong; `param` is the field at fault."""

    message: str
    type: str
    param: str | None
    code: int


class Problem(BaseModel):
    """An error of OpenAI's form, with Cohere's `message` and Jina's `detail`."""

    id: str
    message: str
    detail: str
    error: OpenAiError


class TeiProblem(BaseModel):
    """An error of TEI's form."""

    error: str
    error_type: str


class Refusal(Exception):  # noqa: N818 — an answer, not a fault
    """A request that is not served.

    Args:
        status: HTTP status.
        message: one line for the client.
        param: the field at fault.
        headers: more headers of the response.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.headers = status, message, param, dict(headers or {})


def response(refusal: Refusal, dialect: Dialect, request_id: str) -> Response:
    """Return the response that says why, in a dialect."""
    body: BaseModel
    if dialect == "tei":
        body = TeiProblem(error=refusal.message, error_type=TEI_TYPES.get(refusal.status, "Validation"))
    else:
        kind = TYPES.get(refusal.status, "invalid_request_error")
        error = OpenAiError(message=refusal.message, type=kind, param=refusal.param, code=refusal.status)
        body = Problem(id=request_id, message=refusal.message, detail=refusal.message, error=error)
    # Not by pydantic, which stops at lone surrogates; a message may quote whatever a client sent.
    text = json.dumps(body.model_dump(), ensure_ascii=True)
    return Response(text, refusal.status, refusal.headers, "application/json")


def of_validation(errors: Sequence[Mapping[str, Any]], body: Any) -> Refusal:
    """Return the refusal of a body that is not what the route takes; it names the first field at fault."""
    if isinstance(body, bytes):
        return Refusal(422, "the body must be JSON, with the header Content-Type: application/json")
    first = errors[0]
    if first["type"] == "json_invalid":
        return Refusal(400, f"the body is not JSON: {first['ctx']['error']} at character {first['loc'][-1]}")
    name = field_of(first["loc"][1:]) or "body"
    return Refusal(422, f"{name[:200]}: {str(first['msg']).removeprefix('Value error, ')[:300]}", name[:200])


def of_fault(error: BaseException, request_id: str) -> Refusal:
    """Log an error that is not the client's; return a refusal that says no more than where to look it up."""
    log("failed", logging.ERROR, id=request_id, exception=error)
    return Refusal(500, f"internal error; the log has more under {request_id}")
