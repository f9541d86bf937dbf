"""Search in one opened snapshot: four signals (text and title, each dense and BM25), fused. Evaluation and serving call this same code."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rag_serving.errors import ModelMismatch, QueryError
from rag_serving.fusion import DENSE, LEXICAL, align, effective_weights, fuse_ranks, fuse_scores
from rag_serving.settings import Retrieval, Wording
from rag_serving.snapshots import TABLE, Manifest, snapshot_key, verify
from rag_serving.store import Store
from rag_serving.wording import Candidate, word_evidence

QUERY_CODE = "query-1"  # counts up when the same snapshot would be searched or ranked differently; evaluations are bound to it

VECTOR_COLUMNS = {"dense_text": "vector", "dense_title": "title_vector"}
TEXT_COLUMNS = {"bm25_text": "content", "bm25_title": "title"}
_SHOWN = ("chunk_id", "doc_id", "uri", "title", "heading_path", "text", "start", "end")

Vector = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Hit:
    """A retrieved chunk. `signals` holds each signal's raw score: a cosine, a BM25 score, and what shared wording added."""

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

    async def retrieve(self, query: str, vector: Vector | None, *, k: int, fusion: Retrieval | None = None) -> list[Hit]:
        """The `k` best chunks, best first; ties go to the row written first.

        `vector` is the query's embedding, float32 (dims,), of unit norm; None searches by words alone, on text if no lexical signal has a weight.
        `fusion` overrides that of the manifest, to measure one signal alone.
        """
        if k < 1:
            raise QueryError(f"k is {k}.", fix="Ask for at least one hit.")
        query = query.encode(errors="replace").decode()  # a lone surrogate is no text that can be searched
        fusion = fusion or self._fusion
        weights = effective_weights(fusion.weights.model_dump(), self.manifest.title_distinctness)
        if vector is None:
            weights = {name: weight for name, weight in weights.items() if name in LEXICAL} or {"bm25_text": 1.0}
        else:
            self._check(vector)
        if not weights:
            raise QueryError("no retrieval signal is active.", fix="Give at least one of retrieval.weights a value above 0.")
        depth = max(fusion.candidates, k)
        found = await asyncio.gather(*(self._search(name, query, vector, depth) for name in weights))
        lists = dict(zip(weights, found, strict=True))
        rows, signals = align(lists, depth=depth)
        if not len(rows):
            return []
        by_rank = fusion.fusion == "rank"
        fused = fuse_ranks(rows, lists, weights) if by_rank else fuse_scores(signals, weights)
        order = np.lexsort((rows, -fused))
        fused, rows, signals = fused[order], rows[order], {name: values[order] for name, values in signals.items()}
        hits = await self._hits(rows[: max(k, fusion.wording.pool)], fused, signals)
        return hits[:k] if by_rank else self._reworded(query, hits, fusion.wording)[:k]

    def _reworded(self, query: str, hits: list[Hit], wording: Wording) -> list[Hit]:
        """The best `pool` hits in the order of score plus word evidence; they stay above the rest."""
        pool, rest = hits[: wording.pool], hits[wording.pool :]
        candidates = [Candidate(hit.title, embedded_text(hit.title, hit.text)) for hit in pool]
        bonus = word_evidence(query, candidates, weights=wording, distinctness=self.manifest.title_distinctness)
        scored = [
            replace(hit, score=hit.score + extra, signals={**hit.signals, "wording": round(extra, 6)})
            for hit, extra in zip(pool, bonus, strict=True)
        ]
        return sorted(scored, key=lambda hit: -hit.score) + rest

    async def neighbours(self, vector: Vector, *, k: int, exact: bool) -> list[Neighbour]:
        """The `k` nearest text vectors, by exact search or as serving searches: the two sides of ANN recall."""
        query = self._nearest("vector", vector, k)
        found = await (query.bypass_vector_index() if exact else query).to_arrow()
        return [
            Neighbour(row, 1.0 - distance)
            for row, distance in zip(found["_rowid"].to_pylist(), found["_distance"].to_pylist(), strict=True)
        ]

    def _check(self, vector: Vector) -> None:
        if vector.shape != (self.manifest.dims,):
            raise ModelMismatch(
                f"the query vector has shape {vector.shape}, the snapshot has {self.manifest.dims} dimensions.", fix="Use its model."
            )
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
        match = MatchQuery(query, TEXT_COLUMNS[signal])  # type: ignore[call-arg]  # its defaults are invisible to mypy
        hits = await self._table.query().nearest_to_text(match).limit(depth).select(["_score"]).with_row_id().to_arrow()
        return dict(zip(hits["_rowid"].to_pylist(), hits["_score"].to_pylist(), strict=True))

    async def _hits(self, rows: NDArray[np.int64], scores: NDArray[np.float64], signals: Mapping[str, NDArray[np.float64]]) -> list[Hit]:
        table = await self._table.take_row_ids(rows.tolist()).select(list(_SHOWN)).with_row_id().to_arrow()
        shown = {record.pop("_rowid"): record for record in table.to_pylist()}
        return [
            Hit(**shown[row], score=float(scores[i]), signals={name: round(float(values[i]), 6) for name, values in signals.items()})
            for i, row in enumerate(rows.tolist())
        ]


def embedded_text(title: str, text: str) -> str:
    """The text that stands for a chunk in the vector index, in the full-text index and in word evidence alike."""
    return f"{title}\n{text}" if title and not text.startswith(title) else text


async def open_table(folder: Path) -> Any:
    """The LanceDB table of a snapshot folder, pinned: it never looks for newer versions."""
    import lancedb

    database = await lancedb.connect_async(folder, read_consistency_interval=None)
    return await database.open_table(TABLE)
