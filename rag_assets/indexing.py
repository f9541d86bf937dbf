"""Building a snapshot: one LanceDB table with vector and full-text indexes, frozen by checks, sealed with a manifest, published once."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rag_serving.errors import SnapshotError
from rag_serving.fusion import title_distinctness
from rag_serving.retrieval import Retriever, embedded_text, open_table
from rag_serving.settings import Index, ModelSpec, Retrieval
from rag_serving.snapshots import TABLE, Manifest, find_by_build_key, hash_tree, seal, snapshot_key
from rag_serving.store import Store

Vectors = NDArray[np.float32]
_CODE_VERSION = "snapshot-2"
_REFINE = 2
_SAMPLE = 200


@dataclass(frozen=True, slots=True)
class Recipe:
    """Every input of a build but the rows themselves; two builds of equal recipe and corpus give the same snapshot."""

    model: ModelSpec
    fingerprint: str
    corpus_sha256: str
    documents: int
    chunking: Mapping[str, Any]
    index: Index
    retrieval: Retrieval

    @property
    def build_key(self) -> str:
        inputs = {
            "code": _CODE_VERSION,
            "lancedb": version("lancedb"),
            "fingerprint": self.fingerprint,
            "model": self.model.name,
            "corpus": self.corpus_sha256,
            "chunking": dict(self.chunking),
            "index": self.index.model_dump(),
            "retrieval": self.retrieval.model_dump(),
        }
        return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Health:
    """What the freeze checks measured; `problems` is empty for a snapshot that may be published."""

    rows: int
    indexed_rows: Mapping[str, int]
    self_retrieval: float
    ann_recall: float

    @property
    def problems(self) -> list[str]:
        found = [f"index {name} covers {count} of {self.rows} rows" for name, count in self.indexed_rows.items() if count != self.rows]
        if self.self_retrieval < 0.99:
            found.append(f"only {self.self_retrieval:.1%} of sampled chunks find themselves first")
        return found


async def build_snapshot(
    store: Store, recipe: Recipe, chunks: pa.Table, vectors: Vectors, title_vectors: Vectors, *, parent: str | None
) -> tuple[Manifest, Health | None]:
    """Publish the snapshot of these rows, or return the one that exists (then Health is None: nothing was built).

    `chunks` has a row a chunk (chunk_id, doc_id, uri, title, heading_path, text, start, end); the vectors are float32 (rows, dims).
    Raises SnapshotError, leaving the store as it was, when a freeze check fails.
    """
    existing = find_by_build_key(store, recipe.build_key)
    if existing:
        return existing, None
    _check_rows(chunks, vectors, title_vectors, recipe.model.dims)
    indexed = chunks.num_rows >= recipe.index.hnsw_from_rows
    with store.staging("snapshots/build") as folder:
        await _write_table(folder, _with_vectors(chunks, vectors, title_vectors), recipe.index, indexed=indexed)
        index = {"vector_index": "IVF_HNSW_SQ" if indexed else None, "refine_factor": _REFINE, **recipe.index.model_dump()}
        manifest = Manifest(
            build_key=recipe.build_key,
            embedding_model=recipe.model.name,
            fingerprint=recipe.fingerprint,
            dims=recipe.model.dims,
            corpus_sha256=recipe.corpus_sha256,
            documents=recipe.documents,
            rows=chunks.num_rows,
            chunking=dict(recipe.chunking),
            index=index,
            retrieval=recipe.retrieval.model_dump(),
            title_distinctness=_distinctness(chunks),
            parent=parent,
            lancedb=version("lancedb"),
            built_at=datetime.now(UTC).isoformat(timespec="seconds"),
            files={},
        )
        health = await _freeze(folder, manifest, vectors)
        if health.problems:
            raise SnapshotError(
                f"the new snapshot is not sound: {'; '.join(health.problems)}.", fix="Correct the rows or the index settings."
            )
        manifest = Manifest(**{**{name: getattr(manifest, name) for name in Manifest.__slots__}, "files": hash_tree(folder)})
        seal(folder, manifest)
        store.publish(folder, snapshot_key(manifest.snapshot_id))
    return manifest, health


def _check_rows(chunks: pa.Table, vectors: Vectors, title_vectors: Vectors, dims: int) -> None:
    rows = chunks.num_rows
    if rows == 0:
        raise SnapshotError("there are no chunks to index.", fix="Check the corpus source.")
    if len(set(chunks["chunk_id"].to_pylist())) != rows:
        raise SnapshotError("two chunks share an id.", fix="Check the chunker.")
    for name, matrix in (("text", vectors), ("title", title_vectors)):
        if matrix.shape != (rows, dims):
            raise SnapshotError(f"{name} vectors are {matrix.shape}, expected ({rows}, {dims}).", fix="Check dims in ragline.toml.")
        unit = np.abs(np.linalg.norm(matrix, axis=1) - 1) < 1e-3
        if matrix.dtype != np.float32 or not unit.all():
            bad = f"{rows - int(unit.sum())} of {rows} {name} vectors ({matrix.dtype}) are not finite with norm 1"
            raise SnapshotError(f"{bad}.", fix="Embed the corpus again; check the model with `ragline doctor`.")


def _with_vectors(chunks: pa.Table, vectors: Vectors, title_vectors: Vectors) -> pa.Table:
    titles, texts = chunks["title"].to_pylist(), chunks["text"].to_pylist()
    dims = vectors.shape[1]
    columns = {
        "content": pa.array([embedded_text(title, text) for title, text in zip(titles, texts, strict=True)]),
        "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), dims),
        "title_vector": pa.FixedSizeListArray.from_arrays(pa.array(title_vectors.ravel()), dims),
    }
    for name, values in columns.items():
        chunks = chunks.append_column(name, values)
    return chunks


def _distinctness(chunks: pa.Table) -> float:
    titles = dict(zip(chunks["doc_id"].to_pylist(), chunks["title"].to_pylist(), strict=True))
    return round(title_distinctness(titles.values()), 6)


async def _write_table(folder: Path, rows: pa.Table, index: Index, *, indexed: bool) -> None:
    import lancedb
    from lancedb.index import FTS, HnswSq

    database = await lancedb.connect_async(folder)
    table = await database.create_table(TABLE, rows)
    for column in ("content", "title"):
        await table.create_index(column, config=FTS(with_position=False))
    if indexed:
        for column in ("vector", "title_vector"):
            await table.create_index(column, config=HnswSq(distance_type="cosine", m=index.m, ef_construction=index.ef_construction))
    await table.optimize(cleanup_older_than=timedelta(days=36500))
    table.close()  # type: ignore[no-untyped-call]


async def _freeze(folder: Path, manifest: Manifest, vectors: Vectors) -> Health:
    table = await open_table(folder)
    statistics = {index.name: await table.index_stats(index.name) for index in await table.list_indices()}
    retriever = Retriever(manifest, table)
    sample = np.random.default_rng(0).choice(manifest.rows, size=min(_SAMPLE, manifest.rows), replace=False)
    recalls, found = [], 0
    for row in sample:
        exact = await retriever.neighbours(vectors[row], k=10, exact=True)
        approximate = await retriever.neighbours(vectors[row], k=10, exact=False) if manifest.index["vector_index"] else exact
        recalls.append(len({hit.row for hit in exact} & {hit.row for hit in approximate}) / len(exact))
        found += bool(approximate) and approximate[0].cosine > 1 - 1e-4
    table.close()
    return Health(
        rows=manifest.rows,
        indexed_rows={name: statistic.num_indexed_rows for name, statistic in statistics.items()},
        self_retrieval=found / len(sample),
        ann_recall=float(np.mean(recalls)),
    )
