"""Search in one opened snapshot: four signals (text and title, each dense and BM25), fused. Evaluation and serving call this same code."""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rag_serving import telemetry
from rag_serving.errors import ModelMismatch, QueryError, SearchUnavailable, in_log
from rag_serving.filters import Filter, condition, filterable
from rag_serving.fusion import DENSE, LEXICAL, Ranked, Values, align, effective_weights, fuse_ranks, fuse_scores
from rag_serving.passages import Passages
from rag_serving.settings import Retrieval
from rag_serving.signals import contract, trace
from rag_serving.snapshots import TABLE, Manifest, snapshot_key, verify
from rag_serving.store import Store
from rag_serving.wording import word_evidence

QUERY_CODE = "query-2"  # counts up when the same snapshot would be searched or ranked differently; evaluations are bound to it

VECTOR_COLUMNS = {"dense_text": "vector", "dense_title": "title_vector"}
TEXT_COLUMNS = {"bm25_text": "content", "bm25_title": "title"}
_WARM_HITS = 30
_LANCE_ERRORS = (RuntimeError, ValueError, OSError)

Vector = NDArray[np.float32]
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Hit:
    """A retrieved chunk. `signals` holds each signal's raw score: a cosine, a BM25 score, and what shared wording added.

    `row` is its place in the snapshot that it was found in.
    """

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
    row: int = field(default=-1, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Neighbour:
    row: int
    cosine: float


class Retriever:
    """An opened, verified snapshot. Safe for concurrent use within one event loop; after `open` only its cache of passages changes."""

    def __init__(self, manifest: Manifest, table: Any) -> None:
        self.manifest = manifest
        self.snapshot_id = manifest.snapshot_id
        self._table = table
        self._fusion = manifest.fusion()
        self._indexed = bool(manifest.index.get("vector_index"))
        self._columns = filterable(manifest.index["filters"])
        self._passages = Passages(table)

    @classmethod
    async def open(cls, store: Store, snapshot_id: str) -> "Retriever":
        """Verify every file of the snapshot, then open it; SnapshotError names a file that is not as the manifest says."""
        manifest = await asyncio.to_thread(verify, store, snapshot_id)
        return cls(manifest, await open_table(store.folder(snapshot_key(snapshot_id))))

    async def warm_up(self, known: Sequence[tuple[str, Vector]] = ()) -> None:
        """Load the indexes and search: once, and for each of the `known` queries and vectors, so that no user pays for it.

        After each search it rests twice as long as that took, so that the requests of another snapshot go on beside it.
        """
        for index in await self._table.list_indices():
            await self._table.prewarm_index(index.name)
        probe = np.zeros(self.manifest.dims, dtype=np.float32)
        probe[0] = 1.0
        for query, vector in (("warm up", probe), *known):
            started = time.perf_counter()
            await self.retrieve(query, vector, k=_WARM_HITS)
            await asyncio.sleep(2 * (time.perf_counter() - started))

    def close(self) -> None:
        self._table.close()

    async def retrieve(
        self,
        query: str,
        vector: Vector | None,
        *,
        k: int,
        fusion: Retrieval | None = None,
        where: Filter | None = None,
        groups: frozenset[str] | None = frozenset(),
        degrade: Callable[[str], None] | None = None,
    ) -> list[Hit]:
        """The `k` best chunks, best first; ties go to the row written first.

        `vector` is the query's embedding, float32 (dims,), of unit norm; None searches by words alone, on text if no lexical signal has a weight.
        `fusion` overrides that of the manifest, to measure one signal alone. Only chunks that `where` holds for and that one of `groups` may
        read, or anyone, take part in any search; groups None reads all. When full text or the vectors cannot be searched, the other kind of
        signal answers and `degrade` is told `text_index` or `vector_index`; without `degrade`, or with nothing left, that is SearchUnavailable.
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
        allowed = condition(where, self._columns, readable_by=groups if self.manifest.restricted else None)
        depth = max(fusion.candidates, k)
        found = await asyncio.gather(
            *(self._search(name, query, vector, depth=depth, allowed=allowed) for name in weights), return_exceptions=True
        )
        lists = self._without_failed(dict(zip(weights, found, strict=True)), degrade)
        by_rank = fusion.fusion == "rank"
        with trace.span(contract.FUSE):
            rows, signals = align(lists, depth=depth)
            fused = fuse_ranks(rows, lists, weights) if by_rank else fuse_scores(signals, weights)
            trace.record({contract.CANDIDATES: len(rows)})
        return await self._hits(rows, fused, signals, k=k, query=query, fusion=None if by_rank else fusion)

    def _without_failed(self, found: Mapping[str, Ranked | BaseException], degrade: Callable[[str], None] | None) -> dict[str, Ranked]:
        """The lists of the signals that could be searched. A kind of signal of which one failed is left out as a whole."""
        errors = {name: each for name, each in found.items() if isinstance(each, BaseException)}
        for error in errors.values():
            if not isinstance(error, _LANCE_ERRORS):
                raise error
        lost = {part: names for part, names in (("text_index", LEXICAL), ("vector_index", DENSE)) if errors.keys() & set(names)}
        out = {name for names in lost.values() for name in names}
        lists = {name: each for name, each in found.items() if isinstance(each, Ranked) and name not in out}
        if errors and (degrade is None or not lists):
            raise self._unusable("cannot be searched") from next(iter(errors.values()))
        for part in lost:
            log.warning("searching %s without its %s: %s", self.snapshot_id, part, in_log(next(iter(errors.values()))))
            if degrade:
                degrade(part)
        return lists

    async def neighbours(self, vector: Vector, *, k: int, exact: bool, groups: frozenset[str] | None = None) -> list[Neighbour]:
        """The `k` nearest text vectors that `groups` may read, by exact search or as serving searches: the two sides of ANN recall."""
        allowed = condition(None, self._columns, readable_by=groups)
        query = self._query("dense_text", "", vector, depth=k, allowed=allowed)
        found = await (query.bypass_vector_index() if exact else query).to_arrow()
        return [
            Neighbour(row, 1.0 - distance)
            for row, distance in zip(found["_rowid"].to_pylist(), found["_distance"].to_pylist(), strict=True)
        ]

    async def vectors(self, hits: Sequence[Hit]) -> Vector:
        """The text vectors of hits of this snapshot, float32 (hits, dims), in order."""
        try:
            table = await self._table.take_row_ids([hit.row for hit in hits]).select(["vector"]).with_row_id().to_arrow()
        except _LANCE_ERRORS as error:
            raise self._unusable("has vectors that cannot be read") from error
        place = {row: at for at, row in enumerate(table["_rowid"].to_pylist())}
        stored: Vector = table["vector"].combine_chunks().flatten().to_numpy().reshape(-1, self.manifest.dims)
        return stored[[place[hit.row] for hit in hits]]

    async def samples(self, count: int) -> tuple[list[str], Vector]:
        """Up to `count` chunks spread evenly over the snapshot: what was embedded of each, and its text vector, float32 (n, dims)."""
        offsets = np.unique(np.linspace(0, self.manifest.rows - 1, min(count, self.manifest.rows)).astype(int))
        try:
            table = await self._table.take_offsets(offsets.tolist()).select(["content", "vector"]).to_arrow()
        except _LANCE_ERRORS as error:
            raise self._unusable("has passages that cannot be read") from error
        stored: Vector = table["vector"].combine_chunks().flatten().to_numpy().reshape(-1, self.manifest.dims)
        return table["content"].to_pylist(), stored

    def _unusable(self, how: str) -> SearchUnavailable:
        return SearchUnavailable(f"{self.snapshot_id} {how}.", fix="Restore the snapshot or build it again.")

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
        ef, refine = self._ef_and_refine(depth)
        if ef:
            query = query.ef(ef).refine_factor(refine)
        return query.select(["_distance"]).with_row_id()

    def _ef_and_refine(self, depth: int) -> tuple[int, int]:
        """How the HNSW index is searched; (0, 0) where there is none."""
        if not self._indexed:
            return 0, 0
        refine = int(self.manifest.index["refine_factor"])
        return max(int(self.manifest.index["ef"]), depth * refine), refine

    def _query(self, signal: str, query: str, vector: Vector | None, *, depth: int, allowed: str | None) -> Any:
        """The LanceDB query of one signal. `allowed` is applied before the search, so it never takes from what was found."""
        from lancedb.query import MatchQuery

        if signal in DENSE:
            search = self._nearest(VECTOR_COLUMNS[signal], np.asarray(vector), depth)
        else:
            match = MatchQuery(query, TEXT_COLUMNS[signal])  # type: ignore[call-arg]  # its defaults are invisible to mypy
            search = self._table.query().nearest_to_text(match).limit(depth).select(["_score"]).with_row_id()
        return search.where(allowed) if allowed else search

    async def _search(self, signal: str, query: str, vector: Vector | None, *, depth: int, allowed: str | None) -> Ranked:
        with trace.span(contract.RETRIEVE_VECTOR if signal in DENSE else contract.RETRIEVE_FTS):
            found = await self._query(signal, query, vector, depth=depth, allowed=allowed).to_arrow()
            index = self._ef_and_refine(depth) if signal in DENSE else None
            telemetry.searched(signal, candidates=len(found), index=index, filtered=allowed)
        scores = 1.0 - found["_distance"].to_numpy() if signal in DENSE else found["_score"].to_numpy()
        return Ranked(found["_rowid"].to_numpy().astype(np.int64), scores.astype(np.float64))

    async def _hits(
        self,
        rows: NDArray[np.int64],
        fused: Values,
        signals: Mapping[str, Values],
        *,
        k: int,
        query: str = "",
        fusion: Retrieval | None = None,
    ) -> list[Hit]:
        """The first `k` rows by fused score. With `fusion` its best `pool` rows are ordered anew by score plus word evidence, above the rest."""
        wording = fusion.wording if fusion else None
        order = np.lexsort((rows, -fused))[: max(k, wording.pool if wording else 0)]
        try:
            passages = await self._passages.read(rows[order].tolist())
        except _LANCE_ERRORS as error:
            raise self._unusable("has passages that cannot be read") from error
        scores = fused[order]
        bonus = np.empty(0)
        if wording:
            pool = [passage.words for passage in passages[: wording.pool]]
            bonus = np.array(word_evidence(query, pool, weights=wording, distinctness=self.manifest.title_distinctness))
            scores[: len(bonus)] += bonus
        ranking = [*np.argsort(-scores[: len(bonus)], kind="stable").tolist(), *range(len(bonus), len(order))]
        hits = []
        for place in ranking[:k]:
            raw = {name: round(float(values[order[place]]), 6) for name, values in signals.items()}
            if place < len(bonus):
                raw["wording"] = round(float(bonus[place]), 6)
            hits.append(Hit(**passages[place].shown, score=float(scores[place]), signals=raw, row=int(rows[order[place]])))
        return hits


async def open_table(folder: Path) -> Any:
    """The LanceDB table of a snapshot folder, pinned: it never looks for newer versions."""
    import lancedb

    database = await lancedb.connect_async(folder, read_consistency_interval=None)
    return await database.open_table(TABLE)
