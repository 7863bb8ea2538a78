"""Errors as each dialect words them.

TEI has `{"error", "error_type"}`. The others get OpenAI's `{"error": {"message", "type", "param", "code"}}`, which vLLM and
infinity speak, and beside it Cohere's `message`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from starlette.responses import Response

Dialect = Literal["openai", "tei"]

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "request_too_large",
    422: "invalid_request_error",
    429: "rate_limit_error",
    500: "internal_error",
    503: "unavailable_error",
    504: "timeout_error",
}
TEI_TYPES = {400: "Empty", 429: "Overloaded", 500: "Backend", 503: "Unhealthy", 504: "Overloaded"}
"""The rest is `Validation`, which is how TEI calls whatever the client could have known."""


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


class JsonResponse(Response):
    """JSON whose strings may hold anything: what UTF-8 cannot say (lone surrogates) becomes `?`."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Return the body."""
        return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8", "replace")


def response(refusal: Refusal, dialect: Dialect, request_id: str) -> JsonResponse:
    """Return the response that says why, in a dialect."""
    body: dict[str, Any]
    if dialect == "tei":
        body = {"error": refusal.message, "error_type": TEI_TYPES.get(refusal.status, "Validation")}
    else:
        kind = TYPES.get(refusal.status, "invalid_request_error")
        error = {"message": refusal.message, "type": kind, "param": refusal.param, "code": refusal.status}
        body = {"id": request_id, "message": refusal.message, "error": error}
    return JsonResponse(body, refusal.status, refusal.headers)


def of_validation(errors: Sequence[Mapping[str, Any]], body: Any) -> Refusal:
    """Return the refusal of a body that is not what the route takes, with the first field at fault."""
    if isinstance(body, bytes):
        return Refusal(422, "the body must be JSON, sent with the header Content-Type: application/json")
    first = errors[0]
    if first["type"] == "json_invalid":
        return Refusal(400, f"the body is not JSON: {first['ctx']['error']} at character {first['loc'][-1]}")
    # A tag of a union is not a field, and neither is the type that pydantic tried.
    path = [str(part) for part in first["loc"][1:] if part not in ("tei", "documents-of-infinity")]
    name = ".".join(path)[:200] or "body"
    return Refusal(422, f"{name}: {first['msg']}"[:500], name)
