"""Queries become vectors: phase two of a request, in this process or by the embedding service (`remote_encoder`).

Whoever encodes, what comes back passes `checked_vectors`, and the encoder's fingerprint must be the one the snapshot was built with.
Nothing here imports torch.
"""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from rag_serving.deadline import Deadline
from rag_serving.errors import EncoderError, EncoderUnavailable, ModelMismatch

if TYPE_CHECKING:
    from rag_serving.models import EmbeddingModel

Vectors = npt.NDArray[np.float32]

NORM_TOLERANCE = 1e-3


class Encoder(Protocol):
    """Turns queries into float32 vectors of unit length, (n, dims), in the order given, before `deadline`. Raises EncoderError."""

    @property
    def model(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    async def encode(self, queries: Sequence[str], *, deadline: Deadline | None = None) -> Vectors: ...
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

    async def encode(self, queries: Sequence[str], *, deadline: Deadline | None = None) -> Vectors:
        """EncoderUnavailable when the deadline passes first; arithmetic that has begun is then finished for nobody."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(deadline.remaining if deadline else None):
                vectors = await loop.run_in_executor(self._thread, self._embedding_model.encode_queries, list(queries))
        except TimeoutError:
            raise EncoderUnavailable(f"{self.model} gave no vectors in time.", fix="Allow more time.") from None
        return checked_vectors(vectors, count=len(queries), dims=self._embedding_model.dims, origin=self.model)

    async def encode_tokens(self, queries: Sequence[str], *, deadline: Deadline | None = None) -> list[Vectors]:
        """The vectors of each query's tokens, float32 (tokens, dims) of unit norm. As `encode`; ModelError when the model has none."""
        encode = partial(self._embedding_model.encode_tokens, list(queries), query=True)
        try:
            async with asyncio.timeout(deadline.remaining if deadline else None):
                return await asyncio.get_running_loop().run_in_executor(self._thread, encode)
        except TimeoutError:
            raise EncoderUnavailable(f"{self.model} gave no token vectors in time.", fix="Allow more time.") from None

    async def aclose(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
