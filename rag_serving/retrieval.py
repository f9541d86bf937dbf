"""Search in one opened snapshot: four signals (text and title, each dense and BM25), fused. Evaluation and serving call this same code."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rag_serving.errors import ModelMismatch, QueryError
from rag_serving.fusion import DENSE, LEXICAL, fuse_ranks, fuse_scores
from rag_serving.settings import Weights
from rag_serving.snapshots import TABLE, Manifest, snapshot_key, verify
from rag_serving.store import Store

VECTOR_COLUMNS = {"dense_text": "vector", "dense_title": "title_vector"}
TEXT_COLUMNS = {"bm25_text": "content", "bm25_title": "title"}
_SHOWN = ("chunk_id", "doc_id", "uri", "title", "heading_path", "text", "start", "end")

Vector = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Hit:
    """A retrieved chunk. `signals` holds each signal's raw score: cosine for the dense ones, BM25 for the lexical ones."""

    chunk_id: str
    doc_id: str
    uri: str
    title: str
    heading_path: str
    text: str
    start: int
    end: int
    score: float
    signals: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Neighbour:
    row: int
    cosine: float


class Retriever:
    """An opened, verified snapshot. Safe for concurrent use within one event loop; nothing in it changes after `open`."""

    def __init__(self, manifest: Manifest, table: Any) -> None:
        self.manifest = manifest
        self.snapshot_id = manifest.snapshot_id
        self._table = table
        self._fusion = manifest.fusion()
        self._indexed = bool(manifest.index.get("vector_index"))

    @classmethod
    async def open(cls, store: Store, snapshot_id: str) -> "Retriever":
        """Verify every file of the snapshot, then open it; SnapshotError names a file that is not as the manifest says."""
        manifest = await asyncio.to_thread(verify, store, snapshot_id)
        return cls(manifest, await open_table(store.folder(snapshot_key(snapshot_id))))

    async def warm_up(self) -> None:
        """Load the indexes and run one search, so that the first user does not pay for it."""
        for index in await self._table.list_indices():
            await self._table.prewarm_index(index.name)
        probe = np.zeros(self.manifest.dims, dtype=np.float32)
        probe[0] = 1.0
        await self.retrieve("warm up", probe, k=1)

    def close(self) -> None:
        self._table.close()

    async def retrieve(self, query: str, vector: Vector | None, *, k: int, weights: Weights | None = None) -> list[Hit]:
        """The `k` best chunks, best first; ties go to the row written first.

        `vector` is the query's embedding, float32 (dims,), of unit norm; None searches by words alone.
        `weights` overrides those of the manifest, to measure one signal alone.
        """
        wanted = (weights or self._fusion.weights).model_dump()
        active = {name: weight for name, weight in wanted.items() if weight > 0 and (vector is not None or name in LEXICAL)}
        if not active:
            raise QueryError("no retrieval signal is active.", fix="Give at least one of retrieval.weights a value above 0.")
        if k < 1:
            raise QueryError(f"k is {k}.", fix="Ask for at least one hit.")
        if vector is not None:
            self._check(vector)
        query = query.encode(errors="replace").decode()  # a lone surrogate is no text that can be searched
        depth = max(self._fusion.candidates, k)
        found = await asyncio.gather(*(self._search(name, query, vector, depth) for name in active))
        signals, rows = await self._complete(dict(zip(active, found, strict=True)), vector)
        if not len(rows):
            return []
        fused = (fuse_ranks if self._fusion.fusion == "rank" else fuse_scores)(signals, active)
        best = np.lexsort((rows, -fused))[:k]
        return await self._hits(rows[best], fused[best], {name: values[best] for name, values in signals.items()})

    async def neighbours(self, vector: Vector, *, k: int, exact: bool) -> list[Neighbour]:
        """The `k` nearest text vectors, by exact search or as serving searches: the two sides of ANN recall."""
        query = self._nearest("vector", vector, k)
        found = await (query.bypass_vector_index() if exact else query).to_arrow()
        return [Neighbour(row, 1.0 - distance) for row, distance in zip(found["_rowid"].to_pylist(), found["_distance"].to_pylist(), strict=True)]

    def _check(self, vector: Vector) -> None:
        if vector.shape != (self.manifest.dims,):
            raise ModelMismatch(f"the query vector has shape {vector.shape}, the snapshot has {self.manifest.dims} dimensions.", fix="Use its model.")
        norm = float(np.linalg.norm(vector))
        if not abs(norm - 1.0) < 1e-3:
            raise QueryError(f"the query vector has norm {norm:.4g}, not 1.", fix="Use the embedding service of the snapshot's model.")

    def _nearest(self, column: str, vector: Vector, depth: int) -> Any:
        query = self._table.query().nearest_to(vector).column(column).distance_type("cosine").limit(depth)
        if self._indexed:
            refine = int(self.manifest.index["refine_factor"])
            query = query.ef(max(int(self.manifest.index["ef"]), depth * refine)).refine_factor(refine)
        return query.select(["_distance"]).with_row_id()

    async def _search(self, signal: str, query: str, vector: Vector | None, depth: int) -> dict[int, float]:
        from lancedb.query import MatchQuery

        if signal in DENSE:
            hits = await self._nearest(VECTOR_COLUMNS[signal], np.asarray(vector), depth).to_arrow()
            return dict(zip(hits["_rowid"].to_pylist(), (1.0 - np.asarray(hits["_distance"])).tolist(), strict=True))
        match = MatchQuery(query, TEXT_COLUMNS[signal])
        hits = await self._table.query().nearest_to_text(match).limit(depth).select(["_score"]).with_row_id().to_arrow()
        return dict(zip(hits["_rowid"].to_pylist(), hits["_score"].to_pylist(), strict=True))

    async def _complete(
        self, found: Mapping[str, Mapping[int, float]], vector: Vector | None
    ) -> tuple[dict[str, NDArray[np.float64]], NDArray[np.int64]]:
        """Score every candidate in every signal: cosines are computed exactly, a BM25 score that was not among the hits counts as 0."""
        rows = np.array(sorted(set().union(*found.values())), dtype=np.int64)
        dense = [name for name in found if name in DENSE]
        signals = {name: np.array([scores.get(row, 0.0) for row in rows.tolist()]) for name, scores in found.items()}
        if vector is not None and dense and len(rows):
            columns = [VECTOR_COLUMNS[name] for name in dense]
            table = await self._table.take_row_ids(rows.tolist()).select(columns).to_arrow()
            for name, column in zip(dense, columns, strict=True):
                matrix = table[column].combine_chunks().flatten().to_numpy().reshape(len(rows), -1)
                signals[name] = (matrix @ vector).astype(np.float64)
        return signals, rows

    async def _hits(self, rows: NDArray[np.int64], scores: NDArray[np.float64], signals: Mapping[str, NDArray[np.float64]]) -> list[Hit]:
        table = await self._table.take_row_ids(rows.tolist()).select(list(_SHOWN)).with_row_id().to_arrow()
        shown = {record.pop("_rowid"): record for record in table.to_pylist()}
        return [
            Hit(**shown[row], score=float(scores[i]), signals={name: round(float(values[i]), 6) for name, values in signals.items()})
            for i, row in enumerate(rows.tolist())
        ]


async def open_table(folder: Path) -> Any:
    """The LanceDB table of a snapshot folder, pinned: it never looks for newer versions."""
    import lancedb

    database = await lancedb.connect_async(folder.resolve(), read_consistency_interval=None)
    return await database.open_table(TABLE)
