"""The embedding service: an OpenAI-shaped `/v1/embeddings` over the configured models, one process for all who need vectors.

A few threads compute (`batching`). Waiting queries are encoded together; documents are cut into small pieces and get what queries leave of the
cores, so a bulk load delays a query by one piece at most. Beyond the OpenAI shape: `input_type` (which prompt), the model's `fingerprint` in each
reply, and `X-Ragline-Deadline-Ms`: work that nobody waits for any more when its turn comes is dropped.
"""

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial

import numpy as np
import numpy.typing as npt
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from opentelemetry.sdk.trace import TracerProvider
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from pydantic import ValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect

from rag_serving.collector import settle
from rag_serving.deadline import Deadline
from rag_serving.edge.draining import DrainingServer
from rag_serving.edge.limits import BodyLimit
from rag_serving.edge.ports import NO_TELEMETRY, require_port, server_config
from rag_serving.embedding.batching import Bench
from rag_serving.embedding.embedder_metrics import EmbedderMetrics
from rag_serving.embedding.embeddings_wire import DEADLINE_HEADER, EmbeddingsReply, EmbeddingsRequest, ModelCard, ModelList, reply_body
from rag_serving.embedding.ranking_service import add_ranking
from rag_serving.embedding.shelf import Shelf
from rag_serving.embedding.traced import Traced
from rag_serving.embedding.turns import Overloaded
from rag_serving.errors import DeadlineExceeded, RaglineError
from rag_serving.models import UnusableText
from rag_serving.settings import Settings
from rag_serving.signals import contract, logs, trace

Vectors = npt.NDArray[np.float32]

MOST_BYTES = 8 << 20  # of one request body
FRESH_SECONDS = 2.0  # a model that made a vector so recently is ready
SWITCH_SECONDS = 0.0001  # how soon a computing thread gets the interpreter back; the default of 5 ms starves it under load

_TOO_LONG = f"The body is longer than {MOST_BYTES} bytes. Send fewer texts at once."


class Refusal(Exception):
    """A request that cannot be served as asked."""

    def __init__(self, status: int, message: str, *, code: str, param: str | None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param


def _error(status: int, message: str, *, code: str, param: str | None = None) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 and status != 429 else "server_error"
    headers = {"Retry-After": "1"} if status in {429, 503} else None
    return JSONResponse({"error": {"message": message, "type": kind, "param": param, "code": code}}, status_code=status, headers=headers)


def _refused(error: Exception) -> JSONResponse:
    """Any failure in the shape OpenAI clients read: {"error": {message, type, param, code}}."""
    if isinstance(error, Refusal):
        return _error(error.status, str(error), code=error.code, param=error.param)
    if isinstance(error, Overloaded):
        return _error(429, "Too much work is waiting. Try again shortly.", code="overloaded")
    if isinstance(error, DeadlineExceeded):
        return _error(504, str(error), code=error.code)
    if isinstance(error, RaglineError):
        return _error(503, str(error), code=error.code)
    if isinstance(error, StarletteHTTPException):
        return _error(error.status_code, str(error.detail), code=f"http_{error.status_code}")
    return _error(500, f"Unexpected {type(error).__name__}; the log of the service has the details.", code="internal")


def _add_error_shape(app: FastAPI) -> None:
    for kind in (Refusal, Overloaded, RaglineError, StarletteHTTPException, Exception):

        @app.exception_handler(kind)
        async def refused(_: Request, error: Exception) -> JSONResponse:
            return _refused(error)


routes = APIRouter()


@routes.post(
    "/v1/embeddings",
    responses={200: {"model": EmbeddingsReply}},
    openapi_extra={"requestBody": {"required": True, "content": {"application/json": {"schema": EmbeddingsRequest.model_json_schema()}}}},
)
async def embeddings(request: Request) -> Response:
    """Vectors of texts, in their order."""
    started, metrics = time.perf_counter(), request.app.state.metrics
    status = 500
    try:
        response = await _embedded(request)
        status = response.status_code
    except ClientDisconnect:
        response = Response(status_code=499)  # nobody reads it
        status = response.status_code
    except Exception as error:
        status = _refused(error).status_code
        raise
    finally:
        metrics.answered(status, time.perf_counter() - started)
    return response


async def _embedded(request: Request) -> Response:
    shelf, bench = request.app.state.shelf, request.app.state.bench
    deadline = _deadline(request)
    body = _read(request.headers.get("content-type", ""), await request.body())
    spec = shelf.specs.get(body.model)
    if spec is None:
        raise Refusal(404, f"The model {body.model!r} is not configured.", code="model_not_found", param="model")
    if body.dimensions not in {None, spec.dims}:
        raise Refusal(400, f"{body.model} has {spec.dims} dimensions.", code="invalid_dimensions", param="dimensions")
    texts = [body.input] if isinstance(body.input, str) else body.input
    model = await shelf.get(body.model)
    trace.note({contract.REQUEST_MODEL: body.model, contract.BATCH: len(texts)})
    work = bench.submit(model, texts, query=body.input_type == "query", deadline=deadline)
    try:
        embedded = await work
    except UnusableText:
        raise Refusal(422, "The model makes no usable vector of a text.", code="unusable_text", param="input") from None
    finally:
        work.cancel()
    reply = reply_body(body, embedded.vectors, tokens=embedded.tokens, fingerprint=model.fingerprint)
    return Response(reply, media_type="application/json")


def _deadline(request: Request) -> Deadline | None:
    stated = request.headers.get(DEADLINE_HEADER)
    if stated is None:
        return None
    if not (stated.isdecimal() and len(stated) < 10):
        raise Refusal(400, f"{DEADLINE_HEADER} must be a number of milliseconds.", code="invalid_deadline", param=None)
    return Deadline.after(int(stated) / 1000)


def _read(content_type: str, body: bytes) -> EmbeddingsRequest:
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise Refusal(415, "Send the body with Content-Type: application/json.", code="unsupported_media_type", param=None)
    try:
        return EmbeddingsRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        param = str(first["loc"][0]) if first["loc"] else None
        where = ".".join(map(str, first["loc"])) or "body"
        raise Refusal(400, f"{where}: {first['msg']}", code=first["type"], param=param) from None


@routes.get("/v1/models")
async def models(request: Request) -> ModelList:
    shelf = request.app.state.shelf
    cards = []
    for name, spec in shelf.specs.items():
        model = shelf.loaded.get(name)
        fingerprint = model.fingerprint if model else None
        cards.append(ModelCard(id=name, dims=spec.dims, max_tokens=spec.max_tokens, loaded=model is not None, fingerprint=fingerprint))
    return ModelList(data=cards)


@routes.get("/livez")
async def livez() -> dict[str, str]:
    return {"status": "alive"}


@routes.get("/readyz")
async def readyz(request: Request) -> JSONResponse:
    """Ready when each preloaded model has embedded a text within the last seconds, or does so now, before all that wait.

    Never when the service is about to end.
    """
    shelf, bench = request.app.state.shelf, request.app.state.bench
    if request.app.state.draining:
        return JSONResponse({"status": "not ready", "models": dict.fromkeys(request.app.state.preload, "ending")}, status_code=503)
    state: dict[str, str] = {}
    for name in request.app.state.preload:
        if name in shelf.loaded:
            if bench.idle(shelf.loaded[name]) > FRESH_SECONDS:
                await bench.submit(shelf.loaded[name], ["ready?"], query=True, first=True)
            state[name] = "ready"
        else:
            state[name] = shelf.failed.get(name, "loading")
    ready = all(value == "ready" for value in state.values())
    return JSONResponse({"status": "ready" if ready else "not ready", "models": state}, status_code=200 if ready else 503)


@routes.get("/metrics")
async def metrics(request: Request) -> Response:
    """Counts, durations and queue depths, for Prometheus."""
    return Response(request.app.state.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)


async def _preload(app: FastAPI) -> None:
    await app.state.shelf.preload(app.state.preload)
    if app.state.loaded is not None:
        app.state.loaded()


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    settings: Settings = app.state.settings
    app.state.metrics = EmbedderMetrics()
    app.state.shelf = Shelf(settings)
    app.state.bench = Bench(
        batch_tokens=settings.embedder.batch_tokens,
        max_wait=settings.embedder.max_wait_ms / 1000,
        most_texts=settings.embedder.queue_texts,
        computed=app.state.metrics.computed,
    )
    app.state.metrics.watch(app.state.bench)
    app.state.bench.start()
    loading = asyncio.create_task(_preload(app))
    yield
    loading.cancel()
    with suppress(asyncio.CancelledError):
        await loading
    await asyncio.to_thread(app.state.bench.close)


def create_app(
    settings: Settings, *, preload: Sequence[str], tracing: TracerProvider | None = None, loaded: Callable[[], None] | None = None
) -> FastAPI:
    """The service over `settings.models`. `preload` starts to load at once and decides readiness; others load on first use. ConfigError.

    `tracing` makes spans of its requests; without it there are none. `loaded` is called once the preloaded models are.
    """
    for name in preload:
        settings.model(name)
    app = FastAPI(title="ragline embedder", version="1", lifespan=_lifespan, telemetry=NO_TELEMETRY)
    app.state.settings, app.state.preload, app.state.loaded, app.state.draining = settings, tuple(preload), loaded, False
    app.include_router(routes)
    add_ranking(app, settings)
    app.add_middleware(BodyLimit, most_bytes=MOST_BYTES, too_long=_TOO_LONG, refusal=partial(_error, code="body_too_long"))
    if tracing is not None:
        app.add_middleware(Traced, tracer=trace.tracer(tracing))
    _add_error_shape(app)
    return app


def serve(settings: Settings, *, models: Sequence[str], host: str, port: int) -> None:
    """Run the service until SIGTERM or SIGINT. Then readiness fails, and after `embedder.drain_seconds` nothing new is taken.

    Requests under way are finished first, for ten seconds at most. Raises PlatformError when the port is taken.
    """
    require_port(host, port, variable="RAGLINE_EMBEDDER_PORT")
    logs.configure(settings.places.log_format, settings.places.log_level)
    sys.setswitchinterval(SWITCH_SECONDS)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a few queries are tokenised sooner than another thread is awake
    telling = settings.telemetry
    tracing = trace.exporting_provider(service="ragline-embedder", share=telling.share, slow_seconds=telling.slow_seconds)
    app = create_app(settings, preload=models, tracing=tracing, loaded=settle)

    def drain() -> None:
        app.state.draining = True

    DrainingServer(server_config(app, host=host, port=port), seconds=settings.embedder.drain_seconds, drain=drain).run()
