"""The client of a rerank endpoint, in either of the two shapes that are about.

An address that ends in `/v1/rerank` or `/v2/rerank` is asked as Cohere, Jina, Voyage, vLLM and Infinity are:
  {model, query, documents, top_n} -> {results: [{index, relevance_score}]}
any other as Text Embeddings Inference is:
  {query, texts} -> [{index, score}]
"""

import asyncio
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import AliasChoices, BaseModel, Field, TypeAdapter, ValidationError

from rag_serving.connections import Pool, Reply, TooLong, Unreachable
from rag_serving.deadline import Deadline
from rag_serving.embedding.embeddings_wire import DEADLINE_HEADER
from rag_serving.errors import RerankError
from rag_serving.signals.trace import outgoing_headers

_VERSIONED = re.compile(r"/v\d+/rerank/?$")
_BYTES_A_PASSAGE = 1024  # of a reply, at most, when the endpoint does not send the passages back
_RESERVE = 64 << 10


class _Result(BaseModel):
    index: int
    score: float = Field(validation_alias=AliasChoices("relevance_score", "score"))


class _Reply(BaseModel):
    results: list[_Result]
    fingerprint: str | None = None


_BARE = TypeAdapter(list[_Result])


class RerankEndpoint:
    """A judge behind HTTP. With a `fingerprint`, replies must carry it. Connections are kept, and belong to the running event loop."""

    def __init__(self, url: str, *, model: str = "", key: str = "", kind: str = "endpoint", fingerprint: str | None = None) -> None:
        self.kind = kind
        self._url = url
        self._model = model
        self._key = key
        self._fingerprint = fingerprint
        self._pool = Pool()

    async def relevance(self, query: str, texts: Sequence[str], *, deadline: Deadline) -> npt.NDArray[np.float64]:
        """The scores as the endpoint gives them. RerankError when it is down, slow, or gives no score or two for a passage."""
        if not self._url:
            raise RerankError("no rerank endpoint is named.", fix="Set RAGLINE_RERANK_URL to its whole address, ending in /rerank.")
        try:
            async with asyncio.timeout(deadline.remaining):
                reply = await self._post(self._body(query, texts), deadline, most=len(texts) * _BYTES_A_PASSAGE + _RESERVE)
        except TimeoutError:
            raise RerankError("the rerank endpoint gave no answer in time.", fix="Raise rerank.budget_ms, or take a quicker one.") from None
        except Unreachable as error:
            raise RerankError(f"the rerank endpoint cannot be reached: {error}.", fix="Check what runs there.") from error
        except TooLong:
            raise RerankError("the rerank endpoint gave more than its scores.", fix="Check what runs there.") from None
        if reply.status != 200:
            raise RerankError(f"the rerank endpoint answered {reply.status}.", fix="Check its model, its key and its log.")
        return self._read(reply.data, count=len(texts))

    async def aclose(self) -> None:
        await self._pool.aclose()

    def _body(self, query: str, texts: Sequence[str]) -> dict[str, Any]:
        if not _VERSIONED.search(self._url):
            return {"query": query, "texts": list(texts)}
        body = {"query": query, "documents": list(texts), "top_n": len(texts), "return_documents": False}
        return {**body, "model": self._model} if self._model else body

    async def _post(self, body: dict[str, Any], deadline: Deadline, *, most: int) -> Reply:
        headers = {DEADLINE_HEADER: str(int(deadline.remaining * 1000)), **outgoing_headers()}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        return await self._pool.post(self._url, json.dumps(body).encode(), headers, most=most)

    def _read(self, data: bytes, *, count: int) -> npt.NDArray[np.float64]:
        try:
            reply = _Reply(results=_BARE.validate_json(data)) if data.lstrip().startswith(b"[") else _Reply.model_validate_json(data)
        except ValidationError as error:
            raise RerankError(
                f"the rerank endpoint gave no usable reply: {error.errors()[0]['msg']}.", fix="Check what runs there."
            ) from None
        if self._fingerprint is not None and reply.fingerprint != self._fingerprint:
            raise RerankError("the rerank endpoint runs another model than the snapshot was measured with.", fix="Build a new snapshot.")
        if sorted(result.index for result in reply.results) != list(range(count)):
            raise RerankError(f"the rerank endpoint gave {len(reply.results)} scores for {count} passages.", fix="Check its limits.")
        scores = np.empty(count)
        for result in reply.results:
            scores[result.index] = result.score
        return scores
