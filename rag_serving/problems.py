"""Refusals over HTTP: each error's code has a status and a title, and goes out as application/problem+json (RFC 9457)."""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from rag_serving.errors import RaglineError

# code of an error -> status and title; an error whose code is not here is a fault of ours
PROBLEMS = {
    "invalid_json": (400, "The body is not JSON"),
    "not_found": (404, "There is nothing at this address"),
    "method_not_allowed": (405, "This address does not take that method"),
    "body_too_slow": (408, "The body took too long"),
    "body_too_long": (413, "The body is too long"),
    "unsupported_media_type": (415, "The body must be JSON"),
    "unknown_field": (422, "Unknown field"),
    "invalid_field": (422, "A field cannot be used"),
    "empty_query": (422, "The query is empty"),
    "query_too_long": (422, "The query is too long"),
    "invalid_characters": (422, "The query is not plain text"),
    "query": (422, "The question cannot be answered as asked"),
    "headers_too_long": (431, "The headers are too long"),
    "internal": (500, "Something went wrong here"),
    "model_mismatch": (503, "The embedding service runs another model than the snapshot's"),
    "not_ready": (503, "No release is open"),
    "deadline_exceeded": (504, "The time for this request has ended"),
}
_CODE_OF_STATUS = {404: "not_found", 405: "method_not_allowed", 408: "body_too_slow", 413: "body_too_long"}


def problem(code: str, detail: str, fix: str, trace_id: str) -> JSONResponse:
    """An error as application/problem+json (RFC 9457)."""
    status, title = PROBLEMS[code]
    body = {"type": "about:blank", "status": status, "title": title, "code": code, "detail": detail, "fix": fix, "trace_id": trace_id}
    headers = {"Retry-After": "1"} if status == 503 else None
    return JSONResponse(body, status_code=status, headers=headers, media_type="application/problem+json")


def add_problems(app: FastAPI) -> None:
    @app.exception_handler(RaglineError)
    async def known(request: Request, error: RaglineError) -> JSONResponse:
        if error.code not in PROBLEMS:
            raise error
        return problem(error.code, error.what, error.fix, request.state.trace_id)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        code = _CODE_OF_STATUS[error.status_code]
        fix = {"body_too_long": "Shorten the question.", "body_too_slow": "Send the body at once."}.get(code, "See /openapi.json.")
        reply = problem(code, str(error.detail), fix, request.state.trace_id)
        reply.headers.update(error.headers or {})
        return reply


def refusal(status: int, message: str) -> ASGIApp:
    async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
        await problem(_CODE_OF_STATUS[status], message, "Shorten the question.", scope["state"]["trace_id"])(scope, receive, send)

    return refuse


DOCUMENTED: dict[int | str, dict[str, Any]] = {
    status: {
        "description": "; ".join(title for code, (at, title) in PROBLEMS.items() if at == status),
        "content": {
            "application/problem+json": {
                "examples": {
                    code: {"value": {"status": at, "title": title, "code": code, "detail": "...", "fix": "...", "trace_id": "0" * 32}}
                    for code, (at, title) in PROBLEMS.items()
                    if at == status
                }
            }
        },
    }
    for status in (400, 408, 413, 415, 422, 500, 503, 504)
}
