"""Content-addressed embeddings: a text is embedded once per fingerprint, ever.

`embeddings/<name>.model.json` remembers which fingerprint a row of ragline.toml had, so that a plan need not load the model.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from rag_assets.vectors import EmbeddingCache, Keys, Vectors, text_keys
from rag_serving.embedding.cpu import computes_bfloat16
from rag_serving.errors import ModelError
from rag_serving.settings import ModelSpec
from rag_serving.store import Store

SEGMENT_TEXTS = 512
WINDOW_TEXTS = 8_192


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


def embed(store: Store, encoder: DocumentEncoder, texts: Sequence[str], *, progress: Callable[[int, int], None] | None = None) -> Embedded:
    """Vectors of `texts`, reading what the store has and computing only the rest. For more than fits in memory there is `embed_missing`."""
    computed = embed_missing(store, encoder, lambda: [texts], progress=progress)
    return Embedded(EmbeddingCache(store, encoder.fingerprint, encoder.dims).vectors(text_keys(texts)), computed)


def embed_missing(
    store: Store,
    encoder: DocumentEncoder,
    batches: Callable[[], Iterable[Sequence[str]]],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Embed what the store does not have yet, and say how many texts that were.

    `batches` gives all texts each time it is called; it is called twice when more is missing than one window of some thousand texts. Within a
    window texts are embedded by length, and committed every 512: what was committed before an interruption stays. `progress` is told (done,
    to do).
    """
    cache = EmbeddingCache(store, encoder.fingerprint, encoder.dims)
    wanted, few = missing(cache, batches())
    done = 0
    for window in [few] if few else _windows(batches, wanted):
        for start in range(0, len(window), SEGMENT_TEXTS):
            texts = window[start : start + SEGMENT_TEXTS]
            vectors = encoder.encode_documents(texts)
            check_vectors(vectors, rows=len(texts), dims=encoder.dims)
            cache.add(text_keys(texts), vectors)
            done += len(texts)
            if progress:
                progress(done, len(wanted))
    return done


def _windows(batches: Callable[[], Iterable[Sequence[str]]], wanted: Keys) -> Iterator[list[str]]:
    """The texts of the wanted keys, each once, some thousand at a time, shortest first."""
    waiting = np.ones(len(wanted), dtype=bool)
    window: list[str] = []
    for texts in batches() if len(wanted) else ():
        keys, first = np.unique(text_keys(texts), return_index=True)
        at = np.minimum(np.searchsorted(wanted, keys), len(wanted) - 1)
        new = (wanted[at] == keys) & waiting[at]
        waiting[at[new]] = False
        window.extend(texts[row] for row in first[new])
        if len(window) >= WINDOW_TEXTS:
            yield sorted(window, key=len)
            window = []
    yield sorted(window, key=len)


def missing(cache: EmbeddingCache, batches: Iterable[Sequence[str]]) -> tuple[Keys, list[str]]:
    """Keys of the texts that have no stored vector, sorted, each once; and those texts, shortest first, if one window holds them."""
    found = [text_keys(())]
    few: dict[str, None] = {}
    for texts in batches:
        keys, first = np.unique(text_keys(texts), return_index=True)
        new = ~cache.holds(keys)
        found.append(keys[new])
        if len(few) <= WINDOW_TEXTS:
            few |= dict.fromkeys(texts[row] for row in first[new])
    return np.unique(np.concatenate(found)), sorted(few, key=len) if len(few) <= WINDOW_TEXTS else []


def remember_fingerprint(store: Store, spec: ModelSpec, fingerprint: str) -> None:
    """Keep which fingerprint this row of ragline.toml has, so that a plan need not load the model."""
    if known_fingerprint(store, spec) != fingerprint:
        record = {"identity": _identity(spec), "fingerprint": fingerprint}
        store.write(f"embeddings/{spec.name}.model.json", json.dumps(record).encode())


def known_fingerprint(store: Store, spec: ModelSpec) -> str | None:
    """The fingerprint this row had when it was last embedded with; None for another row, and for a folder, whose weights may have changed."""
    key = f"embeddings/{spec.name}.model.json"
    if spec.source.startswith("path:") or not store.exists(key):
        return None
    record = json.loads(store.read(key))
    return str(record["fingerprint"]) if record["identity"] == _identity(spec) else None


def _identity(spec: ModelSpec) -> str:
    return hashlib.sha256(json.dumps([spec.model_dump(exclude={"dense_scale"}), computes_bfloat16()], sort_keys=True).encode()).hexdigest()


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
