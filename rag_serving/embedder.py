"""The embedding service: an OpenAI-shaped `/v1/embeddings` over the configured models, one process for all who need vectors.

One thread computes. Waiting queries are encoded together and go before documents, and documents are cut into small pieces, so a bulk load
delays a query by one piece at most. Beyond the OpenAI shape: `input_type` (which prompt), and the model's `fingerprint` in each reply.
"""

import asyncio
import base64
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
import uvicorn
from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from starlette.exceptions import HTTPException as StarletteHTTPException

from rag_serving.batching import Bench, Overloaded
from rag_serving.errors import RaglineError
from rag_serving.limits import BodyLimit
from rag_serving.models import EmbeddingModel, load_model
from rag_serving.ports import require_port
from rag_serving.settings import Settings

Vectors = npt.NDArray[np.float32]

MOST_TEXTS = 256  # of one request
MOST_BYTES = 8 << 20  # of one request body
RETRY_SECONDS = 15  # between attempts to load a preloaded model

log = logging.getLogger(__name__)

Text = Annotated[str, StringConstraints(min_length=1, pattern=r"\S")]


class EmbeddingsRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    input: Text | Annotated[list[Text], Field(min_length=1, max_length=MOST_TEXTS)]
    model: str
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, description="Must be the model's own: vectors are never cut here.")
    input_type: Literal["query", "document"] = Field("document", description="Which prompt the model puts before the text.")
    user: str | None = None


class Embedding(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class Usage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingsReply(BaseModel):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: Usage
    fingerprint: str


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "ragline"
    dims: int
    max_tokens: int
    loaded: bool
    fingerprint: str | None


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Shelf:
    """The configured models, each loaded once, off the event loop, on first use."""

    def __init__(self, settings: Settings) -> None:
        self.specs = {spec.name: spec for spec in settings.models}
        self._models_dir = settings.models_dir
        self._locks = {name: asyncio.Lock() for name in self.specs}
        self.loaded: dict[str, EmbeddingModel] = {}
        self.failed: dict[str, str] = {}

    async def get(self, name: str) -> EmbeddingModel:
        """The model of that configured name. Raises ModelError."""
        async with self._locks[name]:
            if name not in self.loaded:
                model = await asyncio.to_thread(load_model, self.specs[name], self._models_dir, progress=log.info)
                log.info("%s loaded: fingerprint %s, %s", name, model.fingerprint[:12], model.dtype)
                self.loaded[name] = model
        return self.loaded[name]

    async def preload(self, names: Sequence[str]) -> None:
        """Load these, trying again while one fails; `failed` says why."""
        waiting = list(names)
        while waiting:
            for name in list(waiting):
                try:
                    await self.get(name)
                except Exception as error:
                    log.exception("%s cannot be loaded; the next attempt is in %s s", name, RETRY_SECONDS)
                    self.failed[name] = str(error)
                else:
                    waiting.remove(name)
            if waiting:
                await asyncio.sleep(RETRY_SECONDS)


_TOO_LONG = f"The body is longer than {MOST_BYTES} bytes. Send fewer texts at once."


class Refusal(Exception):
    """A request that cannot be served as asked."""

    def __init__(self, status: int, message: str, *, code: str, param: str) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param


def _error(status: int, message: str, *, code: str, param: str | None = None) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 and status != 429 else "server_error"
    headers = {"Retry-After": "1"} if status in {429, 503} else None
    return JSONResponse({"error": {"message": message, "type": kind, "param": param, "code": code}}, status_code=status, headers=headers)


def _add_error_shape(app: FastAPI) -> None:
    """Every failure in the shape OpenAI clients read: {"error": {message, type, param, code}}."""

    @app.exception_handler(Refusal)
    async def refused(_: Request, error: Refusal) -> JSONResponse:
        return _error(error.status, str(error), code=error.code, param=error.param)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        param = str(first["loc"][1]) if len(first["loc"]) > 1 else None
        return _error(400, f"{'.'.join(map(str, first['loc'][1:])) or 'body'}: {first['msg']}", code=first["type"], param=param)

    @app.exception_handler(StarletteHTTPException)
    async def http(_: Request, error: StarletteHTTPException) -> JSONResponse:
        return _error(error.status_code, str(error.detail), code=f"http_{error.status_code}")

    @app.exception_handler(Overloaded)
    async def overloaded(_: Request, __: Overloaded) -> JSONResponse:
        return _error(429, "Too much work is waiting. Try again shortly.", code="overloaded")

    @app.exception_handler(RaglineError)
    async def unavailable(_: Request, error: RaglineError) -> JSONResponse:
        return _error(503, str(error), code=error.code)

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> JSONResponse:
        return _error(500, f"Unexpected {type(error).__name__}; the log of the service has the details.", code="internal")


routes = APIRouter()


@routes.post("/v1/embeddings")
async def embeddings(body: EmbeddingsRequest, request: Request) -> EmbeddingsReply:
    shelf, bench = request.app.state.shelf, request.app.state.bench
    spec = shelf.specs.get(body.model)
    if spec is None:
        raise Refusal(404, f"The model {body.model!r} is not configured.", code="model_not_found", param="model")
    if body.dimensions not in {None, spec.dims}:
        raise Refusal(400, f"{body.model} has {spec.dims} dimensions.", code="invalid_dimensions", param="dimensions")
    texts = [body.input] if isinstance(body.input, str) else body.input
    model = await shelf.get(body.model)
    vectors, tokens = await bench.encode(model, texts, query=body.input_type == "query")
    return EmbeddingsReply(
        data=[Embedding(index=at, embedding=_written(row, body.encoding_format)) for at, row in enumerate(vectors)],
        model=body.model,
        usage=Usage(prompt_tokens=tokens, total_tokens=tokens),
        fingerprint=model.fingerprint,
    )


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
    """Ready when each preloaded model has just embedded a text."""
    shelf, bench = request.app.state.shelf, request.app.state.bench
    state: dict[str, str] = {}
    for name in request.app.state.preload:
        if name in shelf.loaded:
            await bench.encode(shelf.loaded[name], ["ready?"], query=True)
            state[name] = "ready"
        else:
            state[name] = shelf.failed.get(name, "loading")
    ready = all(value == "ready" for value in state.values())
    return JSONResponse({"status": "ready" if ready else "not ready", "models": state}, status_code=200 if ready else 503)


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    app.state.shelf, app.state.bench = Shelf(app.state.settings), Bench()
    tasks = [asyncio.create_task(app.state.bench.run()), asyncio.create_task(app.state.shelf.preload(app.state.preload))]
    yield
    for task in tasks:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def create_app(settings: Settings, *, preload: Sequence[str]) -> FastAPI:
    """The service over `settings.models`. `preload` starts to load at once and decides readiness; others load on first use. ConfigError."""
    for name in preload:
        settings.model(name)
    app = FastAPI(title="ragline embedder", version="1", lifespan=_lifespan)
    app.state.settings, app.state.preload = settings, tuple(preload)
    app.include_router(routes)
    app.add_middleware(BodyLimit, most_bytes=MOST_BYTES, too_long=_TOO_LONG, refusal=partial(_error, code="body_too_long"))
    _add_error_shape(app)
    return app


def _written(row: Vectors, encoding_format: str) -> list[float] | str:
    return base64.b64encode(row.astype("<f4").tobytes()).decode() if encoding_format == "base64" else row.tolist()


def serve(settings: Settings, *, models: Sequence[str], host: str, port: int) -> None:
    """Run the service until SIGTERM or SIGINT; requests under way are finished first, for ten seconds at most.

    Raises PlatformError when the port is taken.
    """
    require_port(host, port, variable="RAGLINE_EMBEDDER_PORT")
    app = create_app(settings, preload=models)
    uvicorn.run(app, host=host, port=port, access_log=False, ws="none", timeout_keep_alive=75, timeout_graceful_shutdown=10)
