"""The client of `/v1/token_embeddings`: the token vectors of a query, from the service that embeds it."""

import asyncio
import base64
import json
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ValidationError

from rag_serving.connections import Pool, Reply, TooLong, Unreachable
from rag_serving.deadline import Deadline
from rag_serving.embedding.embeddings_wire import DEADLINE_HEADER
from rag_serving.embedding.remote_encoder import START_IT
from rag_serving.encoding import checked_vectors
from rag_serving.errors import EncoderError, EncoderUnavailable, ModelMismatch
from rag_serving.signals.trace import outgoing_headers

Vectors = npt.NDArray[np.float32]
_MOST_TOKENS = 8192  # of one query


class _Row(BaseModel):
    index: int
    embedding: str


class _Reply(BaseModel):
    data: list[_Row]
    fingerprint: str


class RemoteTokens:
    """The token encoder of one embedding model in the service at `base_url`, whose replies must carry `fingerprint`."""

    def __init__(self, base_url: str, model: str, fingerprint: str, *, dims: int) -> None:
        self._url = base_url.rstrip("/") + "/v1/token_embeddings"
        self._model = model
        self._fingerprint = fingerprint
        self._dims = dims
        self._pool = Pool()

    async def encode_tokens(self, queries: Sequence[str], *, deadline: Deadline) -> list[Vectors]:
        """EncoderUnavailable when the service is down, slow or overloaded; ModelMismatch when it runs another model; else EncoderError."""
        try:
            async with asyncio.timeout(deadline.remaining):
                reply = await self._post(queries, deadline)
        except TimeoutError:
            raise EncoderUnavailable("the embedding service gave no token vectors in time.", fix=START_IT) from None
        except Unreachable as error:
            raise EncoderUnavailable(f"the embedding service cannot be reached: {error}.", fix=START_IT) from error
        except TooLong:
            raise EncoderError("the embedding service gave more than its token vectors.", fix="Check what runs at that address.") from None
        if reply.status != 200:
            raise EncoderUnavailable(f"the embedding service gave no token vectors: {reply.status}.", fix="Look at its log.")
        return self._read(reply.data, count=len(queries))

    async def aclose(self) -> None:
        await self._pool.aclose()

    async def _post(self, queries: Sequence[str], deadline: Deadline) -> Reply:
        body = json.dumps({"model": self._model, "input": list(queries), "input_type": "query"}).encode()
        headers = {DEADLINE_HEADER: str(int(deadline.remaining * 1000)), **outgoing_headers()}
        return await self._pool.post(self._url, body, headers, most=len(queries) * _MOST_TOKENS * self._dims * 6)

    def _read(self, data: bytes, *, count: int) -> list[Vectors]:
        fix = "Check what runs at that address."
        try:
            reply = _Reply.model_validate_json(data)
            flat = [np.frombuffer(base64.b64decode(row.embedding, validate=True), dtype="<f4") for row in reply.data]
        except (ValidationError, ValueError):
            raise EncoderError("the embedding service gave no usable token vectors.", fix=fix) from None
        if reply.fingerprint != self._fingerprint:
            raise ModelMismatch(
                f"the embedding service serves {self._model!r} with fingerprint {reply.fingerprint[:12]}, not {self._fingerprint[:12]}.",
                fix="Run the embedder with the model the snapshot was built with.",
            )
        if [row.index for row in reply.data] != list(range(count)) or any(not len(row) or len(row) % self._dims for row in flat):
            raise EncoderError("the embedding service gave token vectors of another count or length.", fix=fix)
        rows = [row.reshape(-1, self._dims) for row in flat]
        return [checked_vectors(each, count=len(each), dims=self._dims, origin="the embedding service") for each in rows]
