"""The vector search at 100,000 x 384, with and without an access list: latency and recall against exact search."""

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from evals.bench.figures import Figure, alternate, reached
from evals.bench.rig import Rig, Vectors, clustered_vectors
from rag_serving.retrieval import Retriever
from rag_serving.store import LocalStore

_DIMS = 384
_K = 10
_FEW = 8
_SHARES: Mapping[str, float] = MappingProxyType({"one in a hundred": 0.01, "a third": 1 / 3})


async def run(rig: Rig, *, rows: int = 100_000, searches: int = 200) -> list[Figure]:
    """The table is kept below the state folder, so that only the first run builds it."""
    centres = max(rows // 100, 2)
    readers = _readers(rows)
    store = LocalStore(rig.settings.home / "bench" / "scale")
    rig.reporter.note(f"building a snapshot of {rows:,} x {_DIMS} clustered vectors, if there is none yet: minutes")
    vectors = clustered_vectors(rows, _DIMS, centres=centres, seed=0)
    manifest = await rig.synthetic_snapshot(vectors, tag="scale", store=store, acl=lambda number: [readers[number]])
    probes = clustered_vectors(searches, _DIMS, centres=centres, seed=1)
    retriever = await Retriever.open(store, manifest.snapshot_id)
    await retriever.warm_up()
    figures = []
    for name, groups in {"everything": None, **{name: frozenset({name}) for name in (*_SHARES, "few")}}.items():
        readable = rows if groups is None else int((readers == name).sum())
        rig.reporter.note(f"{searches} searches for readers of {readable:,} rows, served and exact in turn")
        figures += await _figures(retriever, probes, name=name, readable=readable, groups=groups)
    retriever.close()
    return figures


def _readers(rows: int) -> NDArray[np.object_]:
    """The group that may read each row: 8 rows for `few`, the shares above for theirs, the others for a group that nobody asks as."""
    draws = np.random.default_rng(2).random(rows)
    readers = np.full(rows, "others", dtype=object)
    low = 0.0
    for name, share in _SHARES.items():
        readers[(draws >= low) & (draws < low + share)] = name
        low += share
    readers[np.linspace(0, rows - 1, _FEW).astype(int)] = "few"
    return readers


async def _figures(retriever: Retriever, probes: Vectors, *, name: str, readable: int, groups: frozenset[str] | None) -> list[Figure]:
    found: dict[bool, dict[int, set[int]]] = {True: {}, False: {}}

    async def search(number: int, *, exact: bool) -> None:
        hits = await retriever.neighbours(probes[number], k=_K, exact=exact, groups=groups)
        found[exact][number] = {hit.row for hit in hits}

    pairs = await alternate(
        lambda number: search(number, exact=False),
        lambda number: search(number, exact=True),
        rounds=len(probes),
        warm_up=min(20, len(probes)),
    )
    wanted = min(_K, readable)
    recall = float(np.mean([len(found[False][number] & found[True][number]) / wanted for number in range(len(probes))]))
    note = f"{readable:,} readable of {retriever.manifest.rows:,} x {_DIMS}, {retriever.manifest.index['vector_index'] or 'no index'}"
    promise = 10 if groups is None else None
    return [
        pairs.milliseconds(f"{name}: p50", peer_is="exact search", limit=False, note=note),
        pairs.tail_milliseconds(f"{name}: p95", peer_is="exact search", promise_ms=promise),
        Figure(f"{name}: recall@{wanted}", recall, "", 1.0, "exact search", recall, promise=reached(recall, 0.95)),
    ]
