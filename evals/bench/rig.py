"""What benches share: settings, a scratch folder on the disk of the store, the model with its bare peer, and snapshots to measure on."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rag_assets import steps
from rag_assets.attributes import attributes_of, row_schema
from rag_assets.corpus import read_table
from rag_assets.indexing import build_snapshot
from rag_assets.recipe import Recipe
from rag_assets.workbench import Reporter, Workbench
from rag_serving.embedding.pytorch import PARITY_FLOOR
from rag_serving.embedding.weights import pull
from rag_serving.errors import ModelError
from rag_serving.models import EmbeddingModel
from rag_serving.passages import embedded_text
from rag_serving.settings import Settings
from rag_serving.snapshots import Manifest
from rag_serving.store import LocalStore, Store

Vectors = NDArray[np.float32]
_SIZES = (4, 8, 16, 32, 64)
_SIZING_TEXTS = 64


@dataclass(frozen=True)
class Rig:
    """`settings` name the corpus and the eval set that benches run on; `scratch` is removed by whoever made it."""

    settings: Settings
    scratch: Path
    reporter: Reporter
    model_name: str

    @cached_property
    def workbench(self) -> Workbench:
        """A line of its own below the state folder, so that running again embeds nothing; the release is never touched."""
        return Workbench(self.settings, store=LocalStore(self.settings.home / "bench" / "store"), reporter=self.reporter)

    @property
    def model(self) -> EmbeddingModel:
        return self.workbench.model(self.model_name)

    @cached_property
    def bare_model(self) -> Any:
        """The same weights as a plain SentenceTransformer, in the dtype and with the input length that ours uses."""
        import torch
        from sentence_transformers import SentenceTransformer

        spec = self.settings.model(self.model_name)
        bare = SentenceTransformer(str(pull(spec.source, self.settings.models_dir, progress=self.reporter.note)), device="cpu")
        if self.model.dtype == "bfloat16":
            bare.to(torch.bfloat16)
        if hasattr(bare[0], "auto_model"):
            bare.max_seq_length = spec.max_tokens
        return bare

    def bare_encode(self, texts: Sequence[str], *, batch_size: int) -> Vectors:
        vectors: Vectors = self.bare_model.encode(list(texts), batch_size=batch_size, show_progress_bar=False, convert_to_numpy=True)
        return vectors

    def best_batch_size(self, texts: Sequence[str]) -> int:
        """The batch size at which the bare model is quickest on 64 of these texts, the better of two passes each."""
        some = texts[:: max(1, len(texts) // _SIZING_TEXTS)][:_SIZING_TEXTS]
        self.bare_encode(some[:16], batch_size=16)

        def seconds(size: int) -> float:
            started = perf_counter()
            self.bare_encode(some, batch_size=size)
            return perf_counter() - started

        quickest = {size: min(seconds(size) for _ in range(2)) for size in _SIZES}
        return min(quickest, key=quickest.__getitem__)

    def check_same(self, ours: Vectors, bare: Vectors) -> None:
        """ModelError unless both sides made the same vectors: a ratio between different work says nothing."""
        lengths = np.linalg.norm(bare, axis=1)
        lowest = float(((ours * bare).sum(axis=1) / lengths).min())
        if not lowest > PARITY_FLOOR:
            raise ModelError(
                f"{self.model_name} and its bare peer give different vectors: cosine {lowest:.5f}.",
                fix="Compare their dtype and max_tokens.",
            )

    def chunk_texts(self) -> list[str]:
        """The distinct embedded texts of the corpus, in order."""
        steps.ingest_corpus(self.workbench)
        _, chunks = read_table(self.workbench.store, "chunks")
        titles, texts = chunks["title"].to_pylist(), chunks["text"].to_pylist()
        return list(dict.fromkeys(embedded_text(title, text) for title, text in zip(titles, texts, strict=True)))

    def corpus_snapshot(self) -> Manifest:
        """The snapshot of the corpus; not to be called from an event loop's thread."""
        self.chunk_texts()
        return steps.snapshot_corpus(self.workbench, self.model_name).manifest

    @cached_property
    def scratch_store(self) -> Store:
        return LocalStore(self.scratch / "store")

    async def synthetic_snapshot(
        self, vectors: Vectors, *, tag: str, store: Store | None = None, acl: Callable[[int], list[str]] = lambda _: []
    ) -> Manifest:
        """A snapshot with these unit vectors, as text and as title vectors, under short made-up texts; in the scratch store if no other."""
        rows = [
            {
                "chunk_id": hashlib.sha256(f"{tag} {number}".encode()).hexdigest()[:32],
                "doc_id": f"{tag}-{number}",
                "uri": f"bench:{tag}/{number}",
                "title": f"{tag} {number}",
                "heading_path": "",
                "text": f"passage {number} of group {number % 97}",
                "start": 0,
                "end": 1,
                **attributes_of(acl(number), {}, {}),
            }
            for number in range(len(vectors))
        ]
        recipe = Recipe(
            model=self.settings.model(self.model_name).model_copy(update={"dims": vectors.shape[1]}),
            fingerprint="synthetic",
            corpus_sha256=hashlib.sha256(tag.encode() + vectors.tobytes()).hexdigest(),
            documents=len(rows),
            chunking={},
            index=self.settings.index,
            retrieval=self.settings.retrieval,
        )
        table = pa.Table.from_pylist(rows, schema=row_schema({}))
        manifest, _ = await build_snapshot(store or self.scratch_store, recipe, table, vectors, vectors, parent=None)
        return manifest


def clustered_vectors(count: int, dims: int, *, centres: int, seed: int) -> Vectors:
    """Unit vectors at a cosine of about 0.8 to one of `centres` points: nearer to embeddings of text than uniform noise.

    The points are the same for every seed, so that queries drawn with another seed fall among the rows.
    """
    points = np.random.default_rng(0).standard_normal((centres, dims))
    rng = np.random.default_rng([1, seed])
    vectors = points[rng.integers(centres, size=count)] + 0.75 * rng.standard_normal((count, dims))
    unit: Vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    return unit
