"""What the embedding service offers beside embeddings, for reranking: token vectors, and the configured cross-encoder as `/v1/rerank`.

Both run outside the line of `batching`, one request at a time, and more than a few waiting ones are refused: who asks has a tight budget and
something to fall back to.
"""

import asyncio
import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, FastAPI, Request
from pydantic import BaseModel, Field, StringConstraints, ValidationError
from starlette.exceptions import HTTPException

from rag_serving.deadline import Deadline
from rag_serving.embedding.embeddings_wire import DEADLINE_HEADER
from rag_serving.ranking.cross_encoder import CrossEncoder
from rag_serving.settings import Settings

MOST_WAITING = 32
_UNSTATED = 60.0  # seconds, for a caller that names no deadline

Text = Annotated[str, StringConstraints(min_length=1, pattern=r"\S")]
Body = TypeVar("Body", bound=BaseModel)


class TokensRequest(BaseModel):
    model: str
    input: list[Text] = Field(min_length=1, max_length=16)
    input_type: Literal["query", "document"] = "query"


class TokenRow(BaseModel):
    index: int
    tokens: int
    embedding: str = Field(description="Base64 of float32, little endian, token after token; each of unit norm.")


class TokensReply(BaseModel):
    object: Literal["list"] = "list"
    data: list[TokenRow]
    model: str
    dims: int
    fingerprint: str


class RerankRequest(BaseModel):
    query: Text
    documents: list[str] = Field(min_length=1, max_length=200)
    model: str = ""
    top_n: int | None = Field(None, ge=1)


class RerankResult(BaseModel):
    index: int
    relevance_score: float


class RerankReply(BaseModel):
    model: str
    results: list[RerankResult] = Field(description="Best first.")
    fingerprint: str


class Queue:
    """One at a time, few waiting."""

    def __init__(self) -> None:
        self._turn = asyncio.Semaphore(1)
        self._waiting = 0

    @asynccontextmanager
    async def turn(self, deadline: Deadline) -> AsyncIterator[None]:
        """HTTP 503 when too many wait, 504 when the deadline passes before it is one's turn."""
        if self._waiting >= MOST_WAITING:
            raise HTTPException(503, "Too much work is waiting. Try again shortly.")
        self._waiting += 1
        try:
            async with asyncio.timeout(deadline.remaining):
                await self._turn.acquire()
        except TimeoutError:
            raise HTTPException(504, "The time for this request ended before its turn.") from None
        finally:
            self._waiting -= 1
        try:
            yield
        finally:
            self._turn.release()


class Ranking:
    """What the routes below work with; the cross-encoder loads on first use."""

    def __init__(self, settings: Settings) -> None:
        self.queue = Queue()
        self._settings = settings
        self._cross_encoder: CrossEncoder | None = None

    async def cross_encoder(self, name: str) -> CrossEncoder:
        """HTTP 404 unless that is the configured one, or none is named. Raises ModelError. Only within one's turn."""
        rule = self._settings.rerank
        if rule.method != "cross_encoder" or name not in {"", rule.model}:
            raise HTTPException(404, f"The reranker {name!r} is not configured.")
        if self._cross_encoder is None:
            self._cross_encoder = await asyncio.to_thread(CrossEncoder.load, rule.model, self._settings.models_dir)
        return self._cross_encoder


routes = APIRouter()


def _schema(model: type[BaseModel]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": model.model_json_schema()}}}}


@routes.post("/v1/token_embeddings", openapi_extra=_schema(TokensRequest))
async def token_embeddings(request: Request) -> TokensReply:
    """The vectors of the tokens of each text, without those that carry no word."""
    body, deadline = await _read(request, TokensRequest)
    shelf = request.app.state.shelf
    if body.model not in shelf.specs:
        raise HTTPException(404, f"The model {body.model!r} is not configured.")
    model = await shelf.get(body.model)
    async with request.app.state.ranking.queue.turn(deadline):
        found = await asyncio.to_thread(model.encode_tokens, body.input, query=body.input_type == "query")
    data = [
        TokenRow(index=at, tokens=len(rows), embedding=base64.b64encode(rows.astype("<f4").tobytes()).decode())
        for at, rows in enumerate(found)
    ]
    return TokensReply(data=data, model=body.model, dims=model.dims, fingerprint=model.fingerprint)


@routes.post("/v1/rerank", openapi_extra=_schema(RerankRequest))
async def rerank(request: Request) -> RerankReply:
    """Scores of passages for a query by the configured cross-encoder, in Cohere's and Jina's shape."""
    body, deadline = await _read(request, RerankRequest)
    ranking: Ranking = request.app.state.ranking
    async with ranking.queue.turn(deadline):
        model = await ranking.cross_encoder(body.model)
        scores = await model.relevance(body.query, body.documents, deadline=deadline)
    order = (-scores).argsort(kind="stable").tolist()[: body.top_n]
    results = [RerankResult(index=at, relevance_score=float(scores[at])) for at in order]
    return RerankReply(model=body.model, results=results, fingerprint=model.fingerprint)


async def _read(request: Request, model: type[Body]) -> tuple[Body, Deadline]:
    stated = request.headers.get(DEADLINE_HEADER, "")
    deadline = Deadline.after(int(stated) / 1000 if stated.isdecimal() and len(stated) < 10 else _UNSTATED)
    try:
        return model.model_validate_json(await request.body()), deadline
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise HTTPException(400, f"{'.'.join(map(str, first['loc'])) or 'body'}: {first['msg']}") from None


def add_ranking(app: FastAPI, settings: Settings) -> None:
    """Offer the routes of this module; the app keeps its models in `state.shelf`."""
    app.state.ranking = Ranking(settings)
    app.include_router(routes)
