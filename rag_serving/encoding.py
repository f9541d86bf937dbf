"""Queries become vectors: phase two of a request, either in this process or by the embedding service.

Whoever encodes, what comes back passes `checked_vectors`, and the service's fingerprint must be the one the snapshot was built with.
Nothing here imports torch.
"""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol

import httpx2
import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ValidationError

from rag_serving.errors import EncoderError, EncoderUnavailable, ModelMismatch
from rag_serving.telemetry import outgoing_headers

if TYPE_CHECKING:
    from rag_serving.models import EmbeddingModel

Vectors = npt.NDArray[np.float32]

MOST_TEXTS = 256  # of one request to the service
NORM_TOLERANCE = 1e-3
START_IT = "Start it with `ragline embedder`."


class Encoder(Protocol):
    """Turns queries into float32 vectors of unit length, (n, dims), in the order given. Raises EncoderError."""

    @property
    def model(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    async def encode(self, queries: Sequence[str]) -> Vectors: ...
    async def aclose(self) -> None: ...


def checked_vectors(vectors: npt.ArrayLike, *, count: int, dims: int, origin: str) -> Vectors:
    """The vectors as float32 of unit length, (count, dims); EncoderError when their shape, a value or a norm (1 +/- 0.001) is wrong."""
    try:
        rows = np.asarray(vectors, dtype=np.float32)
    except (ValueError, TypeError):
        raise EncoderError(f"{origin} gave vectors of unequal length or of no numbers.", fix="Check the embedding service.") from None
    if count == 0 and rows.size == 0:
        return np.empty((0, dims), dtype=np.float32)
    if rows.shape != (count, dims):
        raise EncoderError(f"{origin} gave an array of shape {rows.shape}, expected {(count, dims)}.", fix="Check the model's dims.")
    norms = np.linalg.norm(rows, axis=1)
    if not np.isfinite(norms).all():
        raise EncoderError(f"{origin} gave NaN or infinite values.", fix="Restart the embedding service; try dtype float32.")
    if np.abs(norms - 1).max() > NORM_TOLERANCE:
        raise EncoderError(f"{origin} gave a vector of length {norms[np.abs(norms - 1).argmax()]:.4f}, expected 1.", fix="Normalise it.")
    unit: Vectors = rows / norms[:, None]
    return unit


def require_fingerprint(encoder: "Encoder", fingerprint: str) -> None:
    """ModelMismatch unless the encoder is the model that the snapshot was built with: its vectors must never be searched there."""
    if encoder.fingerprint != fingerprint:
        raise ModelMismatch(
            f"{encoder.model!r} has fingerprint {encoder.fingerprint[:12]}, the snapshot needs {fingerprint[:12]}.",
            fix="Restore the model's row in ragline.toml, or build and release a new snapshot with it.",
        )


class LocalEncoder:
    """A model in this process, on one thread of its own, so that the event loop never waits for arithmetic."""

    def __init__(self, embedding_model: "EmbeddingModel") -> None:
        self._embedding_model = embedding_model
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="encoder")

    @property
    def model(self) -> str:
        return self._embedding_model.spec.name

    @property
    def fingerprint(self) -> str:
        return self._embedding_model.fingerprint

    async def encode(self, queries: Sequence[str]) -> Vectors:
        loop = asyncio.get_running_loop()
        vectors = await loop.run_in_executor(self._thread, self._embedding_model.encode_queries, list(queries))
        return checked_vectors(vectors, count=len(queries), dims=self._embedding_model.dims, origin=self.model)

    async def aclose(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)


class RemoteEncoder:
    """The embedding service at `base_url`, whose replies must carry `fingerprint`; one `encode` takes at most `timeout_seconds`.

    Connections are kept between calls and belong to the running event loop: `aclose()` before it ends; the encoder can be used again after.
    """

    def __init__(self, base_url: str, model: str, fingerprint: str, *, dims: int, timeout_seconds: float) -> None:
        self.base_url = base_url.rstrip("/")
        self.model = model
        self.fingerprint = fingerprint
        self._dims = dims
        self._timeout_seconds = timeout_seconds
        self._client: httpx2.AsyncClient | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def encode(self, queries: Sequence[str]) -> Vectors:
        """EncoderUnavailable when the service is down, slow or overloaded; ModelMismatch when its vectors are not the snapshot's."""
        try:
            async with asyncio.timeout(self._timeout_seconds):
                groups = [queries[start : start + MOST_TEXTS] for start in range(0, len(queries), MOST_TEXTS)]
                parts = [self._read(await self._post(group), count=len(group)) for group in groups]
        except TimeoutError:
            raise EncoderUnavailable(
                f"the embedding service at {self.base_url} gave no answer within {self._timeout_seconds} s.", fix=START_IT
            ) from None
        return np.concatenate(parts) if parts else np.empty((0, self._dims), dtype=np.float32)

    async def aclose(self) -> None:
        client, self._client = self._client, None
        if client is not None and self._loop is asyncio.get_running_loop():
            await client.aclose()

    async def _post(self, queries: Sequence[str]) -> httpx2.Response:
        body = {"model": self.model, "input": list(queries), "input_type": "query", "encoding_format": "float"}
        try:
            try:
                return await self._pool().post("/v1/embeddings", json=body, headers=outgoing_headers())
            except (httpx2.RemoteProtocolError, httpx2.ReadError, httpx2.WriteError):
                # a kept connection that the service closed while idle; asking again is safe
                return await self._pool().post("/v1/embeddings", json=body, headers=outgoing_headers())
        except httpx2.TransportError as error:
            raise EncoderUnavailable(
                f"the embedding service at {self.base_url} cannot be reached: {type(error).__name__} {error}.", fix=START_IT
            ) from error

    def _pool(self) -> httpx2.AsyncClient:
        loop = asyncio.get_running_loop()
        if self._client is None or self._loop is not loop:
            limits = httpx2.Limits(max_connections=32, max_keepalive_connections=8, keepalive_expiry=30)
            timeout = httpx2.Timeout(self._timeout_seconds)
            self._client = httpx2.AsyncClient(base_url=self.base_url, timeout=timeout, limits=limits, trust_env=False)
            self._loop = loop
        return self._client

    def _read(self, response: httpx2.Response, *, count: int) -> Vectors:
        origin = f"the embedding service at {self.base_url}"
        if response.status_code == 429 or response.status_code >= 500:
            raise EncoderUnavailable(f"{origin} answered {response.status_code}: {_message(response)}.", fix=START_IT)
        if response.status_code != 200:
            raise EncoderError(
                f"{origin} refused {self.model!r} with {response.status_code}: {_message(response)}.", fix="Check its configured models."
            )
        try:
            reply = _Reply.model_validate_json(response.content)
        except ValidationError as error:
            raise EncoderError(
                f"{origin} gave no usable reply: {error.errors()[0]['msg']}.", fix="Check what runs at that address."
            ) from None
        if reply.fingerprint != self.fingerprint:
            served = (reply.fingerprint or "none")[:12]
            raise ModelMismatch(
                f"{origin} serves {self.model!r} with fingerprint {served}, the snapshot needs {self.fingerprint[:12]}.",
                fix="Run the embedder with the model, prompts and dtype the snapshot was built with, or build a new snapshot.",
            )
        if [row.index for row in reply.data] != list(range(count)):
            raise EncoderError(f"{origin} gave {len(reply.data)} vectors for {count} texts, or not in order.", fix="Check the service.")
        return checked_vectors([row.embedding for row in reply.data], count=count, dims=self._dims, origin=origin)


class _Row(BaseModel):
    index: int
    embedding: list[float]


class _Reply(BaseModel):
    data: list[_Row]
    fingerprint: str | None = None


def _message(response: httpx2.Response) -> str:
    try:
        body: Any = response.json()
        return str(body["error"]["message"])[:200]
    except (ValueError, KeyError, TypeError):
        return response.text[:200]
