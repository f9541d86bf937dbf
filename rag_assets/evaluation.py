"""Evaluating a snapshot: every query of an eval set through the code and bytes that serving uses, kept in the store as evidence."""

import asyncio
import io
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from evals.collections import EvalSet
from evals.metrics import QueryRow, document_ranking, score_rankings, summarise
from rag_serving.encoding import Encoder, Vectors, require_fingerprint
from rag_serving.errors import AlreadyExists, StoreError
from rag_serving.retrieval import QUERY_CODE, Retriever
from rag_serving.settings import Retrieval, Weights, Wording
from rag_serving.snapshots import Manifest
from rag_serving.store import Store

_NO_WORDING = Wording(pool=0)
BM25_ALONE = Retrieval(weights=Weights(dense_text=0, dense_title=0, bm25_text=1, bm25_title=0), wording=_NO_WORDING)
DENSE_ALONE = Retrieval(weights=Weights(dense_text=1, dense_title=0, bm25_text=0, bm25_title=0), wording=_NO_WORDING)
_DEPTH = 50
_RECALL_SAMPLE = 200
_TIMED = 200
_AT_ONCE = 8
_ENCODE_BATCH = 256


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A snapshot measured on an eval set. `metrics` and `bm25` hold aggregates; the rows of each query are read by `read_rows`.

    `query_code` is the version of the code that searched; an evaluation by another version is measured again.
    """

    snapshot_id: str
    manifest_sha256: str
    embedding_model: str
    corpus_sha256: str
    eval_set: str
    eval_set_sha256: str
    k: int
    measured_at: str
    metrics: Mapping[str, float]
    bm25: Mapping[str, float]
    ann_recall: float
    query_code: str = ""
    reused: bool = False

    @property
    def key(self) -> str:
        return evaluation_key(self.manifest_sha256, self.eval_set_sha256)

    @property
    def mrr(self) -> float:
        return self.metrics[f"mrr_at_{self.k}"]


def evaluation_key(manifest_sha256: str, eval_set_sha256: str) -> str:
    return f"evaluations/{manifest_sha256[:32]}/{eval_set_sha256[:32]}"


async def measure(
    retriever: Retriever,
    vectors: Vectors | None,
    eval_set: EvalSet,
    *,
    k: int,
    fusion: Retrieval | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[QueryRow, ...]:
    """Retrieve for every query and score the document rankings; `vectors` has a row a query, None for words alone.

    The first 200 queries go one after the other and are timed; the rest go eight at a time.
    """
    rankings: dict[str, Sequence[tuple[str, float]]] = {}
    latencies: dict[str, float] = {}

    async def rank(number: int) -> None:
        query = eval_set.queries[number]
        hits = await retriever.retrieve(query.text, None if vectors is None else vectors[number], k=max(_DEPTH, k), fusion=fusion)
        rankings[query.query_id] = document_ranking((hit.chunk_id, hit.doc_id, hit.score) for hit in hits)

    total = len(eval_set.queries)
    for number in range(min(_TIMED, total)):
        started = time.perf_counter()
        await rank(number)
        latencies[eval_set.queries[number].query_id] = (time.perf_counter() - started) * 1000
    for start in range(_TIMED, total, _AT_ONCE):
        await asyncio.gather(*(rank(number) for number in range(start, min(start + _AT_ONCE, total))))
        if progress:
            progress(min(start + _AT_ONCE, total), total)
    return score_rankings(eval_set.qrels, rankings, k=k, latencies_ms=latencies)


async def encode_queries(encoder: Encoder, eval_set: EvalSet) -> Vectors:
    """The queries' vectors, float32 (queries, dims), in order."""
    texts = [query.text for query in eval_set.queries]
    batches = [await encoder.encode(texts[start : start + _ENCODE_BATCH]) for start in range(0, len(texts), _ENCODE_BATCH)]
    return np.concatenate(batches)


async def ann_recall(retriever: Retriever, vectors: Vectors, *, k: int) -> float:
    """Share of the exact `k` nearest chunks that serving's vector search returns, over up to 200 queries."""
    sample = vectors[np.linspace(0, len(vectors) - 1, min(_RECALL_SAMPLE, len(vectors))).astype(int)]
    shares = []
    for vector in sample:
        exact = {hit.row for hit in await retriever.neighbours(vector, k=k, exact=True)}
        found = {hit.row for hit in await retriever.neighbours(vector, k=k, exact=False)}
        shares.append(len(exact & found) / len(exact))
    return float(np.mean(shares))


async def evaluate(
    store: Store,
    manifest: Manifest,
    eval_set: EvalSet,
    encoder: Callable[[], Encoder],
    *,
    k: int,
    max_age_days: float,
    bm25: Mapping[str, float] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """The evaluation of a snapshot on an eval set: the stored one while it is fresh, else measured and stored.

    `encoder` is called only when something has to be measured. `bm25` is the baseline of full-text search alone where it is known already:
    it is the same for every embedding model.
    """
    stored = read_evaluation(store, manifest.sha256, eval_set.sha256)
    if stored and (stored.k, stored.query_code) == (k, QUERY_CODE) and 0 <= _age_days(stored) <= max_age_days / 2:
        return stored
    retriever = await Retriever.open(store, manifest.snapshot_id)
    encode: Encoder | None = None
    try:
        encode = encoder()
        require_fingerprint(encode, manifest.fingerprint)
        vectors = await encode_queries(encode, eval_set)
        await retriever.warm_up()
        rows = await measure(retriever, vectors, eval_set, k=k, progress=progress)
        baseline = bm25 or summarise(await measure(retriever, None, eval_set, k=k, fusion=BM25_ALONE), k=k)
        recall = await ann_recall(retriever, vectors, k=k)
    finally:
        retriever.close()
        if encode:
            await encode.aclose()
    evaluation = Evaluation(
        snapshot_id=manifest.snapshot_id,
        manifest_sha256=manifest.sha256,
        embedding_model=manifest.embedding_model,
        corpus_sha256=manifest.corpus_sha256,
        eval_set=eval_set.name,
        eval_set_sha256=eval_set.sha256,
        k=k,
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        metrics=summarise(rows, k=k),
        bm25=baseline,
        ann_recall=recall,
        query_code=QUERY_CODE,
    )
    _write(store, evaluation, rows)
    return evaluation


def read_evaluation(store: Store, manifest_sha256: str, eval_set_sha256: str) -> Evaluation | None:
    key = f"{evaluation_key(manifest_sha256, eval_set_sha256)}/summary.json"
    if not store.exists(key):
        return None
    try:
        return Evaluation(**json.loads(store.read(key)), reused=True)
    except (ValueError, TypeError):
        raise StoreError(f"{key} cannot be read.", fix="Delete that file and evaluate again.") from None


def read_rows(store: Store, evaluation: Evaluation) -> list[dict[str, Any]]:
    """The per-query rows of an evaluation, in the order of the eval set; StoreError when they are absent or damaged."""
    name = f"queries-{evaluation.measured_at.replace(':', '').replace('+', 'Z')}.parquet"
    data = store.read(f"{evaluation.key}/{name}")
    try:
        rows: list[dict[str, Any]] = pq.read_table(io.BytesIO(data)).to_pylist()
    except (pa.ArrowInvalid, OSError):
        raise StoreError(f"{evaluation.key}/{name} is damaged.", fix="Delete that folder and evaluate again.") from None
    return rows


def reciprocal_ranks(store: Store, evaluation: Evaluation) -> dict[str, float]:
    return {row["query_id"]: row["reciprocal_rank"] for row in read_rows(store, evaluation)}


def _write(store: Store, evaluation: Evaluation, rows: Sequence[QueryRow]) -> None:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([asdict(row) for row in rows]), buffer, compression="zstd")
    name = f"queries-{evaluation.measured_at.replace(':', '').replace('+', 'Z')}.parquet"
    try:
        store.create(f"{evaluation.key}/{name}", buffer.getvalue())
    except AlreadyExists:
        store.write(f"{evaluation.key}/{name}", buffer.getvalue())
    fields = asdict(evaluation)
    fields.pop("reused")
    store.write(f"{evaluation.key}/summary.json", json.dumps(fields, indent=2).encode())


def _age_days(evaluation: Evaluation) -> float:
    return (datetime.now(UTC) - datetime.fromisoformat(evaluation.measured_at)).total_seconds() / 86400
