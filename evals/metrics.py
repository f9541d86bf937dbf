"""Ranking quality: one row a query first, aggregates of the same rows second.

A query that retrieved nothing scores 0 and stays in every mean; leaving it out flatters the system.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evals.collections import split_of
from evals.power import USUAL_SD, minimum_detectable_drop
from evals.significance import SEED, EvidenceError, bca_interval

_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class QueryRow:
    """What one query scored within the cutoff k.

    `success` is 1.0 if the first document is relevant. `rank` is the 1-based rank of the first relevant document, None if there is none.
    `retrieved` are the first k document ids. `latency_ms` is NaN where nothing was timed. `slices` are the groups the query belongs to
    (`evals.slices`). The span scores are of passages that hold an answer, None where the eval set marks none for the query.
    """

    query_id: str
    reciprocal_rank: float
    ndcg: float
    recall: float
    average_precision: float
    success: float
    rank: int | None
    retrieved: tuple[str, ...]
    latency_ms: float
    slices: tuple[str, ...] = ()
    span_reciprocal_rank: float | None = None
    span_recall: float | None = None


@dataclass(frozen=True, slots=True)
class SpanScore:
    """How a query's passages did: 1 / rank of the first that holds an answer, and the share of those that do which were found."""

    reciprocal_rank: float
    recall: float


@dataclass(frozen=True, slots=True)
class Aggregate:
    """A mean over `n` queries with its 95 % BCa interval."""

    mean: float
    low: float
    high: float
    n: int


def document_ranking(hits: Iterable[tuple[str, str, float]]) -> list[tuple[str, float]]:
    """Fold chunk hits (chunk_id, doc_id, score), best first, to documents: a document stands where its best chunk stood."""
    best: dict[str, float] = {}
    for _, doc_id, score in hits:
        best.setdefault(doc_id, score)
    return list(best.items())


def score_rankings(
    qrels: Mapping[str, Mapping[str, int]],
    rankings: Mapping[str, Sequence[tuple[str, float]]],
    *,
    k: int = 10,
    latencies_ms: Mapping[str, float] | None = None,
    slices: Mapping[str, Sequence[str]] | None = None,
    spans: Mapping[str, SpanScore] | None = None,
) -> tuple[QueryRow, ...]:
    """Score ranked (doc_id, score) lists: RR@k, nDCG@k (linear gain), R@k and AP@k by trec_eval's definitions, and Success@1.

    Judgments above 0 are relevant. One row for each query of `qrels`, in that order; rankings of unjudged queries are not scored. The order
    of a ranking is taken as served: ir_measures would reorder equal scores by id, so it is given the positions instead of the scores.

    Raises EvidenceError if there are no judged queries, if none of the rankings is of a judged query, or if a ranking repeats a document.
    """
    import ir_measures
    from ir_measures import AP, RR, R, Success, nDCG

    if not qrels:
        raise EvidenceError("there are no relevance judgments.", fix="Give an eval set with judged queries.")
    if rankings and not rankings.keys() & qrels.keys():
        raise EvidenceError(
            f"none of the {len(rankings):,} ranked queries, such as {next(iter(rankings))!r}, is among the {len(qrels):,} judged ones.",
            fix="Rank the queries of this eval set.",
        )
    retrieved = {query_id: _served_order(query_id, rankings.get(query_id, ()), k=k) for query_id in qrels}
    run = {query_id: {doc_id: float(-position) for position, doc_id in enumerate(ids)} for query_id, ids in retrieved.items()}
    measures = {"reciprocal_rank": RR @ k, "ndcg": nDCG @ k, "recall": R @ k, "average_precision": AP @ k, "success": Success @ 1}
    judged = {query_id: dict(judgments) for query_id, judgments in qrels.items()}
    values = {
        (metric.query_id, metric.measure): float(metric.value) for metric in ir_measures.iter_calc(list(measures.values()), judged, run)
    }
    rows = []
    for query_id, ids in retrieved.items():
        scores = {name: values.get((query_id, measure), 0.0) for name, measure in measures.items()}
        rank = round(1 / scores["reciprocal_rank"]) if scores["reciprocal_rank"] else None
        span = (spans or {}).get(query_id)
        rows.append(
            QueryRow(
                query_id=query_id,
                rank=rank,
                retrieved=ids,
                latency_ms=(latencies_ms or {}).get(query_id, math.nan),
                slices=tuple((slices or {}).get(query_id, ())),
                span_reciprocal_rank=span.reciprocal_rank if span else None,
                span_recall=span.recall if span else None,
                **scores,
            )
        )
    return tuple(rows)


def score_spans(holding: Mapping[str, Collection[str]], passages: Mapping[str, Sequence[str]], *, k: int) -> dict[str, SpanScore]:
    """Score the first k of each query's ranked `passages` (ids) against those `holding` an answer to it.

    One score for each query of `holding`. A query whose answer no passage holds whole scores 0: that is a loss of chunking.
    """
    scores = {}
    for query_id, wanted in holding.items():
        ranks = [rank for rank, passage in enumerate(passages.get(query_id, ())[:k], start=1) if passage in wanted]
        scores[query_id] = SpanScore(1 / ranks[0], len(ranks) / len(wanted)) if ranks else SpanScore(0.0, 0.0)
    return scores


def require_sound(rows: Sequence[QueryRow]) -> None:
    """Raise EvidenceError if a score is NaN or not between 0 and 1, or a latency is negative or infinite: no evidence rests on such rows."""
    for row in rows:
        scores = (row.reciprocal_rank, row.ndcg, row.recall, row.average_precision, row.success, row.span_reciprocal_rank, row.span_recall)
        wrong = next((score for score in scores if score is not None and not -_ROUNDING <= score <= 1 + _ROUNDING), None)
        if wrong is not None:
            raise EvidenceError(f"query {row.query_id!r} scores {wrong}, which is not between 0 and 1.", fix="Evaluate again.")
        if row.latency_ms < 0 or math.isinf(row.latency_ms):
            raise EvidenceError(f"query {row.query_id!r} took {row.latency_ms} ms.", fix="Check the clock and evaluate again.")


def aggregate(values: Sequence[float], *, seed: int = SEED) -> Aggregate:
    """Mean and 95 % BCa interval of per-query values; raises EvidenceError if there are none."""
    low, high = bca_interval(values, seed=seed)
    return Aggregate(mean=_mean(values), low=low, high=high, n=len(values))


def summarise(rows: Sequence[QueryRow], *, k: int, seed: int = SEED) -> dict[str, float]:
    """The aggregates of an evaluation, under names that MLflow accepts.

    `mrr_at_<k>` with its 95 % interval (`_low`, `_high`) and by half of the eval set (`_tune`, `_heldout`; absent if that half is empty),
    `ndcg_at_<k>`, `recall_at_<k>`, `map_at_<k>`, `success_at_1`, `success_at_<k>`, `queries`, `detectable_drop` (the smallest drop of MRR
    that so many queries surely show, at the largest usual spread of paired differences), `latency_p50_ms` and `latency_p95_ms` if anything
    was timed, and `span_mrr_at_<k>`, `span_recall_at_<k>`, `span_queries` if answers are marked. Raises EvidenceError as `require_sound`.
    """
    require_sound(rows)
    mrr = aggregate([row.reciprocal_rank for row in rows], seed=seed)
    metrics = {
        f"mrr_at_{k}": mrr.mean,
        f"mrr_at_{k}_low": mrr.low,
        f"mrr_at_{k}_high": mrr.high,
        f"ndcg_at_{k}": _mean([row.ndcg for row in rows]),
        f"recall_at_{k}": _mean([row.recall for row in rows]),
        f"map_at_{k}": _mean([row.average_precision for row in rows]),
        "success_at_1": _mean([row.success for row in rows]),
        f"success_at_{k}": _mean([row.success if k == 1 else float(row.rank is not None) for row in rows]),
        "queries": float(len(rows)),
        "detectable_drop": minimum_detectable_drop(USUAL_SD[1], len(rows)),
    }
    for half in ("tune", "heldout"):
        values = [row.reciprocal_rank for row in rows if split_of(row.query_id) == half]
        if values:
            metrics[f"mrr_at_{k}_{half}"] = _mean(values)
    marked = [row for row in rows if row.span_reciprocal_rank is not None]
    if marked:
        metrics[f"span_mrr_at_{k}"] = _mean([row.span_reciprocal_rank or 0.0 for row in marked])
        metrics[f"span_recall_at_{k}"] = _mean([row.span_recall or 0.0 for row in marked])
        metrics["span_queries"] = float(len(marked))
    timed = [row.latency_ms for row in rows if not math.isnan(row.latency_ms)]
    if timed:
        metrics["latency_p50_ms"], metrics["latency_p95_ms"] = (float(value) for value in np.percentile(timed, [50, 95]))
    return metrics


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _served_order(query_id: str, ranking: Sequence[tuple[str, float]], *, k: int) -> tuple[str, ...]:
    ids = tuple(doc_id for doc_id, _ in ranking)
    if len(set(ids)) != len(ids):
        raise EvidenceError(f"the ranking of query {query_id!r} repeats a document.", fix="Fold chunks with document_ranking first.")
    return ids[:k]
