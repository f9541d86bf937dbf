"""Content-addressed embeddings: a text is embedded once per fingerprint, ever.

`embeddings/<fingerprint>/<sha256>.parquet` are write-once segments of (text hash, vector); a segment's name is the hash of its bytes.
"""

import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rag_serving.errors import AlreadyExists, ModelError, StoreError
from rag_serving.store import Store

Vectors = NDArray[np.float32]
_SEGMENT_TEXTS = 512


class DocumentEncoder(Protocol):
    @property
    def fingerprint(self) -> str: ...
    @property
    def dims(self) -> int: ...
    def encode_documents(self, texts: Sequence[str], /) -> Vectors: ...


@dataclass(frozen=True, slots=True)
class Embedded:
    """Vectors of the asked texts in order, float32 (n, dims), and how many had to be computed."""

    vectors: Vectors
    computed: int


def text_key(text: str) -> bytes:
    """The key under which a text's vector is kept: its sha256, 32 bytes."""
    return hashlib.sha256(text.encode()).digest()


class EmbeddingCache:
    """The vectors of one fingerprint in the store."""

    def __init__(self, store: Store, fingerprint: str, dims: int) -> None:
        self._store = store
        self._prefix = f"embeddings/{fingerprint[:32]}"
        self._dims = dims

    def load(self) -> dict[bytes, Vectors]:
        """Every stored vector by text key; StoreError names a segment whose bytes are not what its name says."""
        vectors: dict[bytes, Vectors] = {}
        for name in self._store.names(self._prefix):
            data = self._store.read(f"{self._prefix}/{name}")
            if hashlib.sha256(data).hexdigest() != name.removesuffix(".parquet"):
                raise StoreError(
                    f"embedding segment {self._prefix}/{name} is damaged.", fix="Delete that file; its texts are embedded again."
                )
            table = pq.read_table(io.BytesIO(data))
            matrix = table["vector"].combine_chunks().flatten().to_numpy().reshape(-1, self._dims)
            vectors.update(zip(table["key"].to_pylist(), matrix, strict=True))
        return vectors

    def add(self, keys: Sequence[bytes], vectors: Vectors) -> None:
        """Commit one segment; what is committed is never embedded again."""
        values = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), self._dims)
        table = pa.table({"key": pa.array(keys, pa.binary(32)), "vector": values})
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd")
        data = buffer.getvalue()
        try:
            self._store.create(f"{self._prefix}/{hashlib.sha256(data).hexdigest()}.parquet", data)
        except AlreadyExists:
            return


def embed(store: Store, encoder: DocumentEncoder, texts: Sequence[str], *, progress: Callable[[int, int], None] | None = None) -> Embedded:
    """Vectors of `texts`, reading what the store has and computing only the rest, committed every 512 texts.

    `progress` is told (done, to do) of the computed ones.
    """
    cache = EmbeddingCache(store, encoder.fingerprint, encoder.dims)
    known = cache.load()
    missing = {key: text for text in texts if (key := text_key(text)) not in known}
    keys = sorted(missing, key=lambda key: len(missing[key]))
    for start in range(0, len(keys), _SEGMENT_TEXTS):
        batch = keys[start : start + _SEGMENT_TEXTS]
        vectors = encoder.encode_documents([missing[key] for key in batch])
        check_vectors(vectors, rows=len(batch), dims=encoder.dims)
        cache.add(batch, vectors)
        known.update(zip(batch, vectors, strict=True))
        if progress:
            progress(start + len(batch), len(keys))
    matrix = np.stack([known[text_key(text)] for text in texts]) if texts else np.empty((0, encoder.dims), np.float32)
    return Embedded(matrix, len(keys))


def check_vectors(vectors: Vectors, *, rows: int, dims: int) -> None:
    """ModelError unless `vectors` is float32 (rows, dims), finite and of unit norm."""
    if vectors.shape != (rows, dims) or vectors.dtype != np.float32:
        raise ModelError(
            f"the model gave {vectors.dtype} {vectors.shape}, expected float32 ({rows}, {dims}).", fix="Check dims in ragline.toml."
        )
    norms = np.linalg.norm(vectors, axis=1)
    if not np.isfinite(vectors).all() or (np.abs(norms - 1) > 1e-3).any():
        bad = int((~(np.abs(norms - 1) <= 1e-3)).sum())
        raise ModelError(f"{bad} of {rows} vectors are not finite with norm 1.", fix="Check the model with `ragline doctor`.")
