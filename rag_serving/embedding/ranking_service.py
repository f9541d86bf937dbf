"""What the embedding service offers beside embeddings, for reranking: token vectors, and the configured cross-encoder as `/v1/rerank`.

Both are computed by the threads of `batching`, each in a turn of its own: token vectors of queries in the order of arrival among queries, what
is larger between two pieces of documents, so that no question waits for the reranking of another. More than a few waiting are refused.
"""

import asyncio
import base64
from functools import partial
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, FastAPI, Request
from pydantic import BaseModel, Field, StringConstraints, ValidationError
from starlette.exceptions import HTTPException

from rag_serving.deadline import Deadline
from rag_serving.embedding.embeddings_wire import DEADLINE_HEADER
from rag_serving.ranking.cross_encoder import CrossEncoder
from rag_serving.settings import Settings

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


class Ranking:
    """What the routes below work with; the cross-encoder loads on first use."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._loading = asyncio.Lock()
        self._cross_encoder: CrossEncoder | None = None

    async def cross_encoder(self, name: str) -> CrossEncoder:
        """HTTP 404 unless that is the configured one, or none is named. Raises ModelError."""
        rule = self._settings.rerank
        if rule.method != "cross_encoder" or name not in {"", rule.model}:
            raise HTTPException(404, f"The reranker {name!r} is not configured.")
        async with self._loading:
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
    query = body.input_type == "query"
    found = await request.app.state.bench.turn(partial(model.encode_tokens, body.input, query=query), query=query, deadline=deadline)
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
    model = await ranking.cross_encoder(body.model)
    scores = await request.app.state.bench.turn(partial(model.scores, body.query, body.documents), query=False, deadline=deadline)
    order = (-scores).argsort(kind="stable").tolist()[: body.top_n]
    results = [RerankResult(index=at, relevance_score=float(scores[at])) for at in order]
    return RerankReply(model=body.model, results=results, fingerprint=model.fingerprint)


async def _read(request: Request, model: type[Body]) -> tuple[Body, Deadline]:
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "Send the body with Content-Type: application/json.")
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
