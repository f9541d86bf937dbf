"""Evaluating a snapshot: every query of an eval set through the code and bytes that serving uses, kept in the store as evidence."""

import asyncio
import hashlib
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from evals.collections import EvalSet
from evals.metrics import QueryRow, score_rankings, score_spans, summarise
from rag_assets.background import Background
from rag_assets.local_reranking import Rerankers
from rag_assets.measurement import BM25_ALONE, ann_recall, diversity, encode_queries, holding_passages, measure, serve
from rag_serving.encoding import LocalEncoder, require_fingerprint
from rag_serving.errors import StoreError
from rag_serving.reranking import Reranker
from rag_serving.retrieval import QUERY_CODE, Retriever
from rag_serving.seals import SealBroken, sealed, unsealed
from rag_serving.snapshots import Manifest
from rag_serving.store import Store

MEASURE_CODE = "measure-3"  # counts up when the same hits would give other rows or metrics; evaluations are bound to it

_ROWS = pa.schema(
    [
        ("query_id", pa.string()),
        *((name, pa.float64()) for name in ("reciprocal_rank", "ndcg", "recall", "average_precision", "success")),
        ("rank", pa.int64()),
        ("retrieved", pa.list_(pa.string())),
        ("latency_ms", pa.float64()),
        ("slices", pa.list_(pa.string())),
        *((name, pa.float64()) for name in ("span_reciprocal_rank", "span_recall")),
    ]
)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A snapshot measured on an eval set. `metrics` and `bm25` hold aggregates; the rows of each query are read by `read_rows`.

    `query_code` is the version of the code that searched, `measure_code` of the code that scored; an evaluation by another version is
    measured again. `rows_sha256` binds the rows to it, and a seal over all of it is stored beside it.
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
    measure_code: str = ""
    rows_sha256: str = ""
    reused: bool = False

    @property
    def key(self) -> str:
        return evaluation_key(self.manifest_sha256, self.eval_set_sha256)

    @property
    def mrr(self) -> float:
        return self.metrics[f"mrr_at_{self.k}"]


def evaluation_key(manifest_sha256: str, eval_set_sha256: str) -> str:
    return f"evaluations/{manifest_sha256[:32]}/{eval_set_sha256[:32]}"


async def evaluate(
    store: Store,
    manifest: Manifest,
    eval_set: EvalSet,
    encoder: Callable[[], LocalEncoder],
    *,
    k: int,
    max_age_days: float,
    rerankers: Rerankers = lambda *_: None,
    bm25: Mapping[str, float] | None = None,
    background: Callable[[], Background] | None = None,
    fresh: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """The evaluation of a snapshot on an eval set: the stored one while it is young enough, else measured and stored.

    `fresh` measures again however young the stored one is; what was measured before stays readable in `evaluation_history`. `encoder` is
    called only when something has to be measured, and so are `rerankers`, which opens the reranker of the snapshot, and `background`, which
    gives the slices and answers of the queries. `bm25` is the baseline of full-text search alone where it is known already: it is the same for
    every embedding model.

    Raises EvidenceError if a score or a latency is impossible, StoreError if the stored evaluation was edited.
    """
    stored = read_evaluation(store, manifest.sha256, eval_set.sha256)
    if not fresh and stored and (stored.k, stored.query_code) == (k, QUERY_CODE) and 0 <= _age_days(stored) <= max_age_days / 2:
        return stored
    retriever = await Retriever.open(store, manifest.snapshot_id)
    encode: LocalEncoder | None = None
    reranker: Reranker | None = None
    try:
        encode = encoder()
        require_fingerprint(encode, manifest.fingerprint)
        vectors = await encode_queries(encode, eval_set)
        await retriever.warm_up()
        reranker = await asyncio.to_thread(rerankers, retriever, encode)
        served = await serve(retriever, vectors, eval_set, k=k, reranker=reranker, progress=progress)
        baseline = bm25 or summarise(await measure(retriever, None, eval_set, k=k, fusion=BM25_ALONE), k=k)
        recall = await ann_recall(retriever, vectors, k=k)
    finally:
        retriever.close()
        if reranker:
            await reranker.aclose()
        if encode:
            await encode.aclose()
    known = background() if background else Background({}, {})
    holding = await holding_passages(store, manifest.snapshot_id, known.spans)
    rows = score_rankings(
        eval_set.qrels,
        served.documents,
        k=k,
        latencies_ms=served.latencies_ms,
        slices=known.slices,
        spans=score_spans(holding, served.passage_ids(), k=k),
    )
    evaluation = Evaluation(
        snapshot_id=manifest.snapshot_id,
        manifest_sha256=manifest.sha256,
        embedding_model=manifest.embedding_model,
        corpus_sha256=manifest.corpus_sha256,
        eval_set=eval_set.name,
        eval_set_sha256=eval_set.sha256,
        k=k,
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        metrics={**summarise(rows, k=k), **await diversity(store, manifest.snapshot_id, served, k=k, rows=manifest.rows)},
        bm25=baseline,
        ann_recall=recall,
        query_code=QUERY_CODE,
    )
    return write_evaluation(store, evaluation, rows)


def read_evaluation(store: Store, manifest_sha256: str, eval_set_sha256: str) -> Evaluation | None:
    """The latest evaluation of a snapshot on an eval set; None if there is none or earlier code measured it.

    StoreError when it cannot be read, was edited, or holds impossible numbers.
    """
    key = f"{evaluation_key(manifest_sha256, eval_set_sha256)}/summary.json"
    return _read(store, key) if store.exists(key) else None


def evaluation_history(store: Store, manifest_sha256: str, eval_set_sha256: str) -> list[Evaluation]:
    """Every evaluation of a snapshot on an eval set that present code measured, oldest first: its metrics over time."""
    key = evaluation_key(manifest_sha256, eval_set_sha256)
    found = [_read(store, f"{key}/{name}") for name in store.names(key) if name.startswith("at-")]
    return [evaluation for evaluation in found if evaluation]


def _read(store: Store, key: str) -> Evaluation | None:
    again = "Delete that file and evaluate again."
    try:
        record = store.read(key)
        if json.loads(record).get("measure_code") != MEASURE_CODE:
            return None
        fields = unsealed(record)
        evaluation = Evaluation(**fields, reused=True)
        shares = (evaluation.mrr, evaluation.bm25[f"mrr_at_{evaluation.k}"], evaluation.ann_recall)
        sound = all(map(math.isfinite, evaluation.metrics.values())) and all(0 <= share <= 1 for share in shares)
    except SealBroken:
        raise StoreError(f"{key} was edited after it was measured.", fix=again) from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise StoreError(f"{key} cannot be read.", fix=again) from None
    if not sound:
        raise StoreError(f"{key} holds impossible numbers.", fix=again)
    return evaluation


def read_rows(store: Store, evaluation: Evaluation) -> list[dict[str, Any]]:
    """The per-query rows of an evaluation, in the order of the eval set; StoreError when they are absent or are not what was measured."""
    key = _rows_key(evaluation)
    data = store.read(key)
    if hashlib.sha256(data).hexdigest() != evaluation.rows_sha256:
        raise StoreError(f"{key} is not what was measured: it was damaged or edited.", fix="Delete that folder and evaluate again.")
    rows: list[dict[str, Any]] = pq.read_table(io.BytesIO(data)).to_pylist()
    return rows


def reciprocal_ranks(store: Store, evaluation: Evaluation) -> dict[str, float]:
    return {row["query_id"]: row["reciprocal_rank"] for row in read_rows(store, evaluation)}


def query_slices(store: Store, evaluation: Evaluation) -> dict[str, tuple[str, ...]]:
    """The slices of each query, by query id."""
    return {row["query_id"]: tuple(row["slices"]) for row in read_rows(store, evaluation)}


def write_evaluation(store: Store, evaluation: Evaluation, rows: Sequence[QueryRow]) -> Evaluation:
    """Store an evaluation with its rows as the latest of its snapshot and eval set; returns it as stored, bound to the rows and sealed."""
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([asdict(row) for row in rows], schema=_ROWS), buffer, compression="zstd")
    data = buffer.getvalue()
    bound = replace(evaluation, measure_code=MEASURE_CODE, rows_sha256=hashlib.sha256(data).hexdigest(), reused=False)
    store.write(_rows_key(bound), data)
    fields = asdict(bound)
    fields.pop("reused")
    summary = sealed(fields)
    store.write(f"{bound.key}/at-{bound.measured_at.replace(':', '').replace('+', 'Z')}.json", summary)
    store.write(f"{bound.key}/summary.json", summary)
    return bound


def _rows_key(evaluation: Evaluation) -> str:
    return f"{evaluation.key}/queries-{evaluation.rows_sha256[:32]}.parquet"


def _age_days(evaluation: Evaluation) -> float:
    return (datetime.now(UTC) - datetime.fromisoformat(evaluation.measured_at)).total_seconds() / 86400
