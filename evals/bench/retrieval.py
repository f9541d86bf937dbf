"""What the query path adds to the LanceDB calls it makes, and the vector search alone with its recall."""

import asyncio
from collections.abc import Sequence
from functools import partial

import numpy as np

from evals.bench.figures import Figure, alternate, timed
from evals.bench.rig import Rig, Vectors, clustered_vectors
from rag_assets import steps
from rag_serving.fusion import Ranked
from rag_serving.retrieval import Retriever, Vector, open_table
from rag_serving.snapshots import snapshot_key
from rag_serving.store import Store

_DIMS = 384
_K = 10
_SHOWN = ["chunk_id", "doc_id", "uri", "title", "heading_path", "text", "start", "end"]


class _Recorded(Retriever):
    """A retriever whose searches are answered from what they gave the first time, so that what is left to time is our own work."""

    async def _search(self, signal: str, query: str, vector: Vector | None, *, depth: int, allowed: str | None) -> Ranked:
        recorded: dict[tuple[str, str], Ranked] = self.__dict__.setdefault("recorded", {})
        if (signal, query) not in recorded:
            recorded[signal, query] = await super()._search(signal, query, vector, depth=depth, allowed=allowed)
        return recorded[signal, query]


async def run(rig: Rig, *, queries: int = 200, rows: int = 20_000, searches: int = 400) -> list[Figure]:
    return [*await _query_path(rig, queries=queries), *await _vector_search(rig, rows=rows, searches=searches)]


async def _query_path(rig: Rig, *, queries: int) -> list[Figure]:
    """`Retriever.retrieve` against four searches and a take written by hand, at the same depth and index parameters."""
    from lancedb.query import MatchQuery

    manifest = await asyncio.to_thread(rig.corpus_snapshot)
    texts = [query.text for query in steps.load_eval_set(rig.workbench).queries[:queries]]
    vectors = rig.model.encode_queries(texts)
    store = rig.workbench.store
    retriever = await Retriever.open(store, manifest.snapshot_id)
    table = await open_table(store.folder(snapshot_key(manifest.snapshot_id)))
    await retriever.warm_up()
    fusion, index = manifest.fusion(), manifest.index

    def nearest(column: str, number: int):  # type: ignore[no-untyped-def]  # noqa: ANN202 - LanceDB's query builders have no common type
        query = table.query().nearest_to(vectors[number]).column(column).distance_type("cosine").limit(fusion.candidates)
        if index["vector_index"]:
            query = query.ef(max(index["ef"], fusion.candidates * index["refine_factor"])).refine_factor(index["refine_factor"])
        return query.select(["_distance"]).with_row_id().to_arrow()

    def matching(column: str, number: int):  # type: ignore[no-untyped-def]  # noqa: ANN202
        match = MatchQuery(texts[number], column)  # type: ignore[call-arg]  # its defaults are invisible to mypy
        return table.query().nearest_to_text(match).limit(fusion.candidates).select(["_score"]).with_row_id().to_arrow()

    async def bare(number: int) -> None:
        signals = [nearest("vector", number), nearest("title_vector", number), matching("content", number), matching("title", number)]
        found = await asyncio.gather(*signals)
        rows = list(dict.fromkeys(row for hits in found for row in hits["_rowid"].to_pylist()))
        await table.take_row_ids(rows[: max(_K, fusion.wording.pool)]).select(_SHOWN).with_row_id().to_arrow()

    async def ours(number: int) -> None:
        await retriever.retrieve(texts[number], vectors[number], k=_K)

    rig.reporter.note(f"{len(texts)} queries on {manifest.rows:,} chunks, one at a time")
    pairs = await alternate(ours, bare, rounds=len(texts), warm_up=min(20, len(texts)))
    own_ms = await own_work(store, manifest.snapshot_id, texts, vectors)
    for opened in (retriever, table):
        opened.close()
    peer_is = "four searches and a take, by hand"
    added = (np.asarray(pairs.ours) - np.asarray(pairs.peer)) * 1000
    return [
        pairs.milliseconds("retrieve, p50", peer_is=peer_is, note=f"{manifest.rows:,} chunks, k {_K}"),
        pairs.tail_milliseconds("retrieve, p95", peer_is=peer_is),
        Figure(
            "added to them, p50", float(np.median(added)), "ms", note="of the differences query by query; passages in memory save the take"
        ),
        _own("p50", float(np.median(own_ms)), pairs.peer),
        _own("p95", float(np.percentile(own_ms, 95)), pairs.peer),
    ]


async def own_work(store: Store, snapshot_id: str, texts: Sequence[str], vectors: Vectors) -> Vectors:
    """Milliseconds of `Retriever.retrieve` for each text, without its searches."""
    recorded = await _Recorded.open(store, snapshot_id)

    async def own(number: int) -> None:
        await recorded.retrieve(texts[number], vectors[number], k=_K)

    for number in range(len(texts)):
        await own(number)
    milliseconds = 1000 * np.array([await timed(partial(own, number)) for number in range(len(texts))])
    recorded.close()
    return milliseconds


def _own(which: str, milliseconds: float, searching: Sequence[float]) -> Figure:
    share = milliseconds / (1000 * float(np.median(searching)))
    return Figure(
        f"our own work in it, {which}", milliseconds, "ms", note=f"{share:.0%} of LanceDB's time; searches recorded, passages in memory"
    )


async def _vector_search(rig: Rig, *, rows: int, searches: int) -> list[Figure]:
    """The vector search as serving asks for it, one at a time, against exact search of the same rows."""
    rig.reporter.note(f"building a snapshot of {rows:,} x {_DIMS} clustered vectors")
    centres = max(rows // 100, 2)
    manifest = await rig.synthetic_snapshot(clustered_vectors(rows, _DIMS, centres=centres, seed=0), tag="clustered")
    probes = clustered_vectors(searches, _DIMS, centres=centres, seed=1)
    retriever = await Retriever.open(rig.scratch_store, manifest.snapshot_id)
    await retriever.warm_up()
    found: dict[bool, dict[int, set[int]]] = {True: {}, False: {}}

    async def search(number: int, *, exact: bool) -> None:
        found[exact][number] = {hit.row for hit in await retriever.neighbours(probes[number], k=_K, exact=exact)}

    rig.reporter.note(f"{searches} searches, served and exact in turn")
    pairs = await alternate(
        lambda number: search(number, exact=False), lambda number: search(number, exact=True), rounds=searches, warm_up=min(20, searches)
    )
    retriever.close()
    recall = float(np.mean([len(found[False][number] & found[True][number]) / _K for number in range(searches)]))
    kind = manifest.index["vector_index"] or "no index"
    return [
        pairs.milliseconds(
            "vector search alone, p50", peer_is="exact search", limit=False, note=f"{rows:,} x {_DIMS}, {kind}, ef {manifest.index['ef']}"
        ),
        pairs.tail_milliseconds("vector search alone, p95", peer_is="exact search", promise_ms=10),
        Figure(f"its recall@{_K}", recall, "", 1.0, "exact search", recall),
    ]
