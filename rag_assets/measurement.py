"""Every query of an eval set through the code and bytes that serving uses: rankings, latencies, and what is read off them."""

import asyncio
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from evals.collections import AnswerSpan, EvalSet
from evals.diversity import distinct_documents, hubness, intra_list_similarity
from evals.metrics import QueryRow, document_ranking, score_rankings
from rag_serving.deadline import Deadline
from rag_serving.encoding import Encoder, Vectors
from rag_serving.reranking import Reranker
from rag_serving.retrieval import Retriever, open_table
from rag_serving.settings import Retrieval, Weights, Wording
from rag_serving.snapshots import snapshot_key
from rag_serving.store import Store

_NO_WORDING = Wording(pool=0)
BM25_ALONE = Retrieval(weights=Weights(dense_text=0, dense_title=0, bm25_text=1, bm25_title=0), wording=_NO_WORDING)
DENSE_ALONE = Retrieval(weights=Weights(dense_text=1, dense_title=0, bm25_text=0, bm25_title=0), wording=_NO_WORDING)
_DEPTH = 50
_RERANK_SECONDS = 60.0  # a measurement waits, where a request would go on in fused order
_SAMPLE = 200
_TIMED = 200
_AT_ONCE = 8
_ENCODE_BATCH = 256


@dataclass(frozen=True, slots=True)
class Served:
    """What serving gave to each query, by query id: ranked documents with scores, and the (chunk_id, doc_id) of the first k passages."""

    documents: Mapping[str, Sequence[tuple[str, float]]]
    passages: Mapping[str, Sequence[tuple[str, str]]]
    latencies_ms: Mapping[str, float]

    def passage_ids(self) -> dict[str, tuple[str, ...]]:
        return {query_id: tuple(chunk_id for chunk_id, _ in found) for query_id, found in self.passages.items()}


async def serve(
    retriever: Retriever,
    vectors: Vectors | None,
    eval_set: EvalSet,
    *,
    k: int,
    fusion: Retrieval | None = None,
    reranker: Reranker | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Served:
    """Retrieve for every query, and rerank as the snapshot says; `vectors` has a row a query, None for words alone.

    The first 200 queries go one after the other and are timed; the rest go eight at a time.
    """
    documents: dict[str, Sequence[tuple[str, float]]] = {}
    passages: dict[str, Sequence[tuple[str, str]]] = {}
    latencies: dict[str, float] = {}

    async def rank(number: int) -> None:
        query = eval_set.queries[number]
        depth = max(_DEPTH, k, reranker.pool if reranker else 0)
        hits = await retriever.retrieve(query.text, None if vectors is None else vectors[number], k=depth, fusion=fusion, groups=None)
        if reranker:
            hits = await reranker.rerank(query.text, hits, k=depth, deadline=Deadline.after(_RERANK_SECONDS))
        documents[query.query_id] = document_ranking((hit.chunk_id, hit.doc_id, hit.score) for hit in hits)
        passages[query.query_id] = tuple((hit.chunk_id, hit.doc_id) for hit in hits[:k])

    total = len(eval_set.queries)
    for number in range(min(_TIMED, total)):
        started = time.perf_counter()
        await rank(number)
        latencies[eval_set.queries[number].query_id] = (time.perf_counter() - started) * 1000
    for start in range(_TIMED, total, _AT_ONCE):
        await asyncio.gather(*(rank(number) for number in range(start, min(start + _AT_ONCE, total))))
        if progress:
            progress(min(start + _AT_ONCE, total), total)
    return Served(documents, passages, latencies)


async def measure(
    retriever: Retriever,
    vectors: Vectors | None,
    eval_set: EvalSet,
    *,
    k: int,
    fusion: Retrieval | None = None,
    reranker: Reranker | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[QueryRow, ...]:
    """`serve`, scored on documents."""
    served = await serve(retriever, vectors, eval_set, k=k, fusion=fusion, reranker=reranker, progress=progress)
    return score_rankings(eval_set.qrels, served.documents, k=k, latencies_ms=served.latencies_ms)


async def encode_queries(encoder: Encoder, eval_set: EvalSet) -> Vectors:
    """The queries' vectors, float32 (queries, dims), in order."""
    texts = [query.text for query in eval_set.queries]
    batches = [await encoder.encode(texts[start : start + _ENCODE_BATCH]) for start in range(0, len(texts), _ENCODE_BATCH)]
    return np.concatenate(batches)


async def ann_recall(retriever: Retriever, vectors: Vectors, *, k: int) -> float:
    """Share of the exact `k` nearest chunks that serving's vector search returns, over up to 200 queries."""
    sample = vectors[np.linspace(0, len(vectors) - 1, min(_SAMPLE, len(vectors))).astype(int)]
    shares = []
    for vector in sample:
        exact = {hit.row for hit in await retriever.neighbours(vector, k=k, exact=True)}
        found = {hit.row for hit in await retriever.neighbours(vector, k=k, exact=False)}
        shares.append(len(exact & found) / len(exact))
    return float(np.mean(shares))


async def holding_passages(store: Store, snapshot_id: str, spans: Mapping[str, Sequence[AnswerSpan]]) -> dict[str, frozenset[str]]:
    """The ids of the chunks that hold a whole answer to each query of `spans`; none where every answer was cut in two."""
    wanted = pa.array(sorted({span.doc_id for found in spans.values() for span in found}))
    chunks: dict[str, list[tuple[int, int, str]]] = {}
    if len(wanted):
        table = await open_table(store.folder(snapshot_key(snapshot_id)))
        async for batch in await table.query().select(["chunk_id", "doc_id", "start", "end"]).to_batches():
            for row in batch.filter(pc.is_in(batch["doc_id"], value_set=wanted)).to_pylist():
                chunks.setdefault(row["doc_id"], []).append((row["start"], row["end"], row["chunk_id"]))
        table.close()
    return {query_id: frozenset(_holding(found, chunks)) for query_id, found in spans.items()}


async def held_documents(store: Store, snapshot_id: str, doc_ids: Collection[str]) -> frozenset[str]:
    """Those of `doc_ids` that have a chunk in the snapshot."""
    held: set[str] = set()
    if doc_ids:
        table = await open_table(store.folder(snapshot_key(snapshot_id)))
        async for batch in await table.query().select(["doc_id"]).to_batches():
            held.update(batch["doc_id"].to_pylist())
        table.close()
    return frozenset(held.intersection(doc_ids))


def _holding(spans: Sequence[AnswerSpan], chunks: Mapping[str, Sequence[tuple[int, int, str]]]) -> Iterator[str]:
    for span in spans:
        yield from (chunk_id for start, end, chunk_id in chunks.get(span.doc_id, ()) if start <= span.start and span.end <= end)


async def diversity(store: Store, snapshot_id: str, served: Served, *, k: int, rows: int) -> dict[str, float]:
    """How varied the first k passages are, and whether few of the snapshot's `rows` chunks crowd out the rest.

    `distinct_documents_at_<k>`, `hubness_at_<k>`, and `intra_list_similarity_at_<k>` over up to 200 queries (absent without two passages).
    """
    lists = dict(sorted(served.passage_ids().items()))  # queries come back in no order of their own
    sample = [lists[query_id] for query_id in list(lists)[:: max(1, len(lists) // _SAMPLE)][:_SAMPLE]]
    similarity = intra_list_similarity(sample, await _vectors(store, snapshot_id, {chunk_id for found in sample for chunk_id in found}))
    return {
        f"distinct_documents_at_{k}": distinct_documents([doc_id for _, doc_id in found] for _, found in sorted(served.passages.items())),
        f"hubness_at_{k}": hubness(lists.values(), passages=rows),
        **({} if similarity is None else {f"intra_list_similarity_at_{k}": similarity}),
    }


async def _vectors(store: Store, snapshot_id: str, chunk_ids: set[str]) -> dict[str, Any]:
    if not chunk_ids:
        return {}
    table = await open_table(store.folder(snapshot_key(snapshot_id)))
    names = ", ".join("'" + chunk_id.replace("'", "''") + "'" for chunk_id in sorted(chunk_ids))
    found = await table.query().where(f"chunk_id IN ({names})").select(["chunk_id", "vector"]).to_arrow()
    table.close()
    vectors = found["vector"].combine_chunks()
    matrix = vectors.flatten().to_numpy(zero_copy_only=False).reshape(len(vectors), -1)
    return dict(zip(found["chunk_id"].to_pylist(), matrix, strict=True))
