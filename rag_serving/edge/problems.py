"""Refusals over HTTP: each error's code has a status and a title, and goes out as application/problem+json (RFC 9457)."""

import logging
from typing import Any

from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from rag_serving import telemetry
from rag_serving.errors import LimitExceeded, RaglineError

# code of an error -> status and title; an error whose code is not here is a fault of ours
PROBLEMS = {
    "invalid_json": (400, "The body is not JSON"),
    "unknown_host": (400, "The service has no such name"),
    "unauthorized": (401, "A valid API key is needed"),
    "forbidden": (403, "The API key does not allow this"),
    "cross_origin": (403, "Another site's page may not ask this"),
    "not_found": (404, "There is nothing at this address"),
    "method_not_allowed": (405, "This address does not take that method"),
    "body_too_slow": (408, "The body took too long"),
    "idempotency_conflict": (409, "The key was used for another body"),
    "body_too_long": (413, "The body is too long"),
    "unsupported_media_type": (415, "The body must be JSON"),
    "unknown_field": (422, "Unknown field"),
    "invalid_field": (422, "A field cannot be used"),
    "invalid_filter": (422, "The filter cannot be used"),
    "empty_query": (422, "The query is empty"),
    "query_too_long": (422, "The query is too long"),
    "invalid_characters": (422, "The query is not plain text"),
    "injection": (422, "The query gives orders to a language model"),
    "query": (422, "The question cannot be answered as asked"),
    "rate_limited": (429, "Too many requests a minute"),
    "budget_exhausted": (429, "The day's tokens are used"),
    "headers_too_long": (431, "The headers are too long"),
    "internal": (500, "Something went wrong here"),
    "model_mismatch": (503, "The embedding service runs another model than the snapshot's"),
    "search_unavailable": (503, "The index cannot be searched now"),
    "overloaded": (503, "There is no room for this request now"),
    "not_ready": (503, "No release is open"),
    "deadline_exceeded": (504, "The time for this request has ended"),
}
log = logging.getLogger(__name__)

_CODE_OF_STATUS = {404: "not_found", 405: "method_not_allowed", 408: "body_too_slow", 413: "body_too_long"}


def problem(code: str, detail: str, fix: str, trace_id: str, *, retry_after: float = 1, openai: bool = False) -> JSONResponse:
    """An error as application/problem+json (RFC 9457). `retry_after`, in seconds, is told where trying again can help: 429 and 503.

    With `openai` it says the same once more under `error`, as clients of OpenAI's API read it.
    """
    status, title = PROBLEMS[code]
    telemetry.refused(code, status)
    body: dict[str, Any] = {
        "type": "about:blank",
        "status": status,
        "title": title,
        "code": code,
        "detail": detail,
        "fix": fix,
        "trace_id": trace_id,
    }
    if openai:
        body["error"] = openai_error(body)
    headers = {"Retry-After": f"{retry_after:.0f}"} if status in (429, 503) else {"WWW-Authenticate": "Bearer"} if status == 401 else None
    return JSONResponse(body, status_code=status, headers=headers, media_type="application/problem+json")


def for_openai(path: str) -> bool:
    """Whether clients of OpenAI's API ask at this address."""
    return path.startswith("/v1/chat/")


def openai_error(body: dict[str, Any]) -> dict[str, Any]:
    """What OpenAI's API would say for the problem with this body."""
    kind = "server_error" if body["status"] >= 500 else "invalid_request_error"
    return {"message": f"{body['detail']} {body['fix']}".strip(), "type": kind, "param": None, "code": body["code"]}


def problem_of(error: Exception, trace_id: str, *, openai: bool = False) -> JSONResponse:
    """The reply to a request that ended with this error. Of a fault of ours it says nothing but where to look: the log has it."""
    if isinstance(error, RaglineError) and error.code in PROBLEMS:
        wait = error.retry_after if isinstance(error, LimitExceeded) else 1
        return problem(error.code, error.what, error.fix, trace_id, retry_after=wait, openai=openai)
    if isinstance(error, HTTPException) and error.status_code in _CODE_OF_STATUS:
        code = _CODE_OF_STATUS[error.status_code]
        fix = {"body_too_long": "Shorten the question.", "body_too_slow": "Send the body at once."}.get(code, "See /openapi.json.")
        reply = problem(code, str(error.detail), fix, trace_id, openai=openai)
        reply.headers.update(error.headers or {})
        return reply
    log.error("trace %s failed", trace_id, exc_info=error)
    text = "The request could not be finished; the service's log has the details under the trace id."
    return problem("internal", text, "Try again; report it with the trace id if it stays.", trace_id, openai=openai)


def refusal(status: int, message: str) -> ASGIApp:
    async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
        openai = for_openai(scope["path"])
        reply = problem(_CODE_OF_STATUS[status], message, "Shorten the question.", scope["state"]["trace_id"], openai=openai)
        await reply(scope, receive, send)

    return refuse


class Problem(BaseModel):
    """The body of every refusal. `code` is stable; `detail` says what, and `fix` what to do."""

    type: str = Field(examples=["about:blank"])
    status: int = Field(ge=400, le=599)
    title: str
    code: str
    detail: str
    fix: str
    trace_id: str = Field(pattern="^[0-9a-f]{32}$")


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """These statuses for OpenAPI: what each can mean, with an example of each code."""
    return {status: _documented(status) for status in sorted({*statuses, 400, 431, 500})}


def _documented(status: int) -> dict[str, Any]:
    codes = {code: title for code, (at, title) in PROBLEMS.items() if at == status}
    examples = {
        code: {
            "value": {
                "type": "about:blank",
                "status": status,
                "title": title,
                "code": code,
                "detail": "What happened, with the value.",
                "fix": "What to do.",
                "trace_id": "0af7651916cd43dd8448eb211c80319c",
            }
        }
        for code, title in codes.items()
    }
    found: dict[str, Any] = {
        "description": "; ".join(codes.values()),
        "content": {"application/problem+json": {"schema": Problem.model_json_schema(), "examples": examples}},
    }
    if status in (429, 503):
        found["headers"] = {
            "Retry-After": {"description": "Seconds after which to try again.", "schema": {"type": "integer", "minimum": 1}}
        }
    return found


DOCUMENTED = documented(401, 403, 408, 413, 415, 422, 429, 503, 504)
"""The refusals of a route that works on a question."""
