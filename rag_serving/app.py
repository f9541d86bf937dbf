"""The serving process over HTTP: routes, replies and errors. What is searched, and how, is the pipeline's business."""

import asyncio
import hashlib
import logging
import re
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

import uvicorn
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import SpanKind, Tracer
from pydantic import BaseModel
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rag_serving import pipeline, telemetry
from rag_serving.admission import Question, admit, admit_body
from rag_serving.errors import RaglineError
from rag_serving.feedback import Feedback, propose
from rag_serving.limits import BodyLimit
from rag_serving.live import Live
from rag_serving.pipeline import Trace
from rag_serving.ports import require_port
from rag_serving.replies import FeedbackReply, QueryReply, ReleaseReply, RetrieveReply, query_reply, release_reply, retrieve_reply
from rag_serving.settings import Settings
from rag_serving.store import LocalStore, Store

MOST_BODY_BYTES = 64 << 10
MOST_HEADER_BYTES = 16 << 10
BODY_SECONDS = 10.0

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
}
_CODE_OF_STATUS = {404: "not_found", 405: "method_not_allowed", 408: "body_too_slow", 413: "body_too_long"}
_TOO_LONG = f"The body is longer than {MOST_BODY_BYTES} bytes."

_SECURITY = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; object-src 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
}
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_TRACED = frozenset({"/v1/query", "/v1/retrieve", "/v1/release", "/v1/feedback"})
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}

log = logging.getLogger(__name__)


class Frame:
    """Around every exchange: trace id, request id, security headers, and a reply of our own for what nobody foresaw."""

    def __init__(self, app: ASGIApp, *, tracer: Tracer) -> None:
        self._app = app
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        name = f"{scope['method']} {scope['path']}" if scope["path"] in _TRACED else "request"
        with self._tracer.start_as_current_span(name, telemetry.context_of(headers), kind=SpanKind.SERVER) as span:
            await self._exchange(scope, receive, send, headers, telemetry.trace_id_of(span.get_span_context()))

    async def _exchange(self, scope: Scope, receive: Receive, send: Send, headers: Headers, trace_id: str) -> None:
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["trace_id"] = trace_id
        begun = False

        async def framed(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                out = MutableHeaders(scope=message)
                out["X-Request-Id"] = request_id
                out.setdefault("Cache-Control", "no-store")
                for name, value in _SECURITY.items():
                    out[name] = value
            await send(message)

        if sum(len(name) + len(value) for name, value in scope["headers"]) > MOST_HEADER_BYTES:
            text = f"The headers are longer than {MOST_HEADER_BYTES} bytes together."
            await _problem("headers_too_long", text, "Send fewer or shorter headers.", trace_id)(scope, receive, framed)
            return
        try:
            await self._app(scope, receive, framed)
        except Exception:
            log.exception("request %s, trace %s failed", request_id, trace_id)
            if begun:
                raise
            text = "The request could not be finished; the service's log has the details under the trace id."
            await _problem("internal", text, "Try again; report it with the trace id if it stays.", trace_id)(scope, receive, framed)


def _problem(code: str, detail: str, fix: str, trace_id: str) -> JSONResponse:
    """An error as application/problem+json (RFC 9457)."""
    status, title = PROBLEMS[code]
    body = {"type": "about:blank", "status": status, "title": title, "code": code, "detail": detail, "fix": fix, "trace_id": trace_id}
    headers = {"Retry-After": "1"} if status == 503 else None
    return JSONResponse(body, status_code=status, headers=headers, media_type="application/problem+json")


def _add_problems(app: FastAPI) -> None:
    @app.exception_handler(RaglineError)
    async def known(request: Request, error: RaglineError) -> JSONResponse:
        if error.code not in PROBLEMS:
            raise error
        return _problem(error.code, error.what, error.fix, request.state.trace_id)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        code = _CODE_OF_STATUS[error.status_code]
        fix = {"body_too_long": "Shorten the question.", "body_too_slow": "Send the body at once."}.get(code, "See /openapi.json.")
        reply = _problem(code, str(error.detail), fix, request.state.trace_id)
        reply.headers.update(error.headers or {})
        return reply


def _refusal(status: int, message: str) -> ASGIApp:
    async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
        await _problem(_CODE_OF_STATUS[status], message, "Shorten the question.", scope["state"]["trace_id"])(scope, receive, send)

    return refuse


routes = APIRouter()


def _takes(model: type[BaseModel]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": model.model_json_schema()}}}}


_BODY, _FEEDBACK = _takes(Question), _takes(Feedback)
_ERRORS: dict[int | str, dict[str, Any]] = {
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
    for status in (400, 408, 413, 415, 422, 500, 503)
}


async def _admitted(request: Request) -> tuple[Question, Trace]:
    trace = Trace(request.state.trace_id, request.app.state.tracer)
    body = await request.body()
    with trace.phase("admit"):
        return admit(request.headers.get("content-type", ""), body), trace


@routes.post("/v1/retrieve", openapi_extra=_BODY, responses=_ERRORS)
async def retrieve(request: Request) -> RetrieveReply:
    """The passages nearest to a question, best first."""
    question, trace = await _admitted(request)
    state = request.app.state
    return retrieve_reply(await pipeline.retrieve(state.live, question, top_k=state.settings.serving.top_k, trace=trace), trace)


@routes.post("/v1/query", openapi_extra=_BODY, responses=_ERRORS)
async def query(request: Request) -> QueryReply:
    """An answer quoted from the passages nearest to a question, with citations; `abstained` when they hold none."""
    question, trace = await _admitted(request)
    state = request.app.state
    found, answer = await pipeline.answer(state.live, question, top_k=state.settings.serving.top_k, trace=trace)
    return query_reply(found, answer, trace)


@routes.post("/v1/feedback", status_code=202, openapi_extra=_FEEDBACK, responses=_ERRORS)
async def feedback(request: Request) -> FeedbackReply:
    """A thumb for an answer: its question waits for a judgment, from which the eval set grows. `queued` is false if it waits already."""
    given = admit_body(request.headers.get("content-type", ""), await request.body(), Feedback)
    store = request.app.state.store
    said = given.model_dump(exclude={"query"})
    queued = await asyncio.to_thread(propose, store, given.query, "feedback", **said)
    return FeedbackReply(queued=queued, trace_id=request.state.trace_id)


@routes.get("/v1/release")
async def release(request: Request) -> ReleaseReply:
    """What is live, what was before, what answers here, and the last entries of the ledger."""
    return release_reply(request.app.state.live)


@routes.get("/livez")
async def livez() -> dict[str, str]:
    """The process runs."""
    return {"status": "alive"}


@routes.get("/readyz", responses={503: _ERRORS[503]})
async def readyz(request: Request) -> dict[str, Any]:
    """A verified, warmed snapshot is open; `problem` says why it is not the ledger's newest, if so."""
    live: Live = request.app.state.live
    serving = live.serving
    if serving is None:
        raise live.not_ready()
    problem = release_reply(live).problem
    return {"status": "ready", "snapshot_id": serving.snapshot_id, "release": serving.number, "problem": problem}


@routes.get("/", include_in_schema=False)
async def page(request: Request) -> Response:
    return _asset(request, "index.html")


@routes.get("/static/{name}", include_in_schema=False)
async def static(request: Request, name: str) -> Response:
    return _asset(request, name)


def _asset(request: Request, name: str) -> Response:
    assets: dict[str, tuple[bytes, str, str]] = request.app.state.assets
    if name not in assets:
        raise HTTPException(404, "There is no such file.")
    data, media_type, tag = assets[name]
    headers = {"ETag": tag, "Cache-Control": "no-cache"}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(data, media_type=media_type, headers=headers)


def _read_assets() -> dict[str, tuple[bytes, str, str]]:
    """The page's files: bytes, media type and ETag by name. They are few and small, and only these names are served."""
    assets = {}
    for file in files("rag_serving").joinpath("page").iterdir():
        suffix = file.name[file.name.rfind(".") :]
        if suffix in _TYPES:
            data = file.read_bytes()
            assets[file.name] = (data, _TYPES[suffix], f'"{hashlib.sha256(data).hexdigest()[:32]}"')
    return assets


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    app.state.live.start()
    yield
    await app.state.live.stop()


def create_app(settings: Settings, *, store: Store | None = None, tracing: TracerProvider | None = None) -> FastAPI:
    """The service over a store; default: the settings' own. It starts whatever the store holds, and answers once a release is open.

    `tracing` makes its spans; add span processors to it to send them somewhere.
    """
    tracer = telemetry.tracer(tracing or telemetry.provider())
    app = FastAPI(title="ragline", version="1", lifespan=_lifespan, docs_url=None, redoc_url=None)
    app.state.settings = settings
    app.state.store = store or LocalStore(settings.store_dir)
    app.state.live = Live(app.state.store, settings)
    app.state.assets = _read_assets()
    app.state.tracer = tracer
    app.include_router(routes)
    app.add_middleware(BodyLimit, most_bytes=MOST_BODY_BYTES, too_long=_TOO_LONG, refusal=_refusal, seconds=BODY_SECONDS)
    app.add_middleware(Frame, tracer=tracer)
    _add_problems(app)
    return app


def serve(settings: Settings, *, host: str, port: int) -> None:
    """Run the service until SIGTERM or SIGINT; requests under way are finished first, for ten seconds at most.

    Raises PlatformError when the port is taken.
    """
    require_port(host, port, variable="RAGLINE_SERVING_PORT")
    uvicorn.run(
        create_app(settings), host=host, port=port, access_log=False, ws="none", timeout_keep_alive=75, timeout_graceful_shutdown=10
    )
