"""Fitting the weights of the score after reranking: on the tune half of an eval set, and kept only if the held-out half is better for it.

The loss is listwise: the negative logarithm of the share of a softmax over a query's candidates that falls on the relevant ones (Cao et al.
2007, "ListNet", with one list a query). The fused score keeps weight 1; a temperature is fitted along and dropped, since it orders nothing.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evals.collections import EvalSet, split_of
from evals.metrics import document_ranking, score_rankings
from evals.significance import PairedDifference, paired_difference
from rag_assets.measurement import encode_queries
from rag_assets.searching import Search, open_search
from rag_assets.steps import current_snapshot, load_eval_set
from rag_assets.workbench import Workbench
from rag_serving.deadline import Deadline
from rag_serving.errors import RerankError, SnapshotError
from rag_serving.reranking import SIGNALS, evidence, reordered
from rag_serving.retrieval import Hit
from rag_serving.settings import Rerank, RerankWeights

Floats = NDArray[np.float64]

_PULL = 0.02  # of the squared distance from where the fit begins, a query: few queries move the weights little
_FEATURES = ("relevance", *SIGNALS)
_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Half:
    """MRR of one half of the eval set: in fused order, by the present weights, and by the fitted ones."""

    queries: int
    fused: float
    present: float
    fitted: float


@dataclass(frozen=True, slots=True)
class Fit:
    """Fitted weights and what they do to either half; `heldout_gain` compares them with the present weights, paired by query."""

    weights: RerankWeights
    tune: Half
    heldout: Half
    heldout_gain: PairedDifference

    @property
    def kept(self) -> bool:
        """Whether queries that had no part in the fit are better for it, with confidence 1 - alpha."""
        return self.heldout_gain.lower_bound > 0


@dataclass(frozen=True, slots=True)
class Candidates:
    """The reranker's pool for one query, in fused order: hits, relevance of each, and which are of a relevant document."""

    query_id: str
    hits: Sequence[Hit]
    relevance: Sequence[float]
    relevant: NDArray[np.bool_]


async def gather(search: Search, rule: Rerank, eval_set: EvalSet) -> list[Candidates]:
    """The pool of every query, judged by the snapshot's reranker; relevance is 0 where it has none."""
    vectors = await encode_queries(search.encoder, eval_set)
    found = []
    for query, vector in zip(eval_set.queries, vectors, strict=True):
        hits = await search.retriever.retrieve(query.text, vector, k=rule.pool, groups=None)
        judged = {}
        if search.reranker:
            ranked = await search.reranker.rerank(query.text, hits, k=len(hits), deadline=Deadline.after(_SECONDS))
            judged = {hit.chunk_id: hit.signals.get("relevance", 0.0) for hit in ranked}
        wanted = {doc_id for doc_id, score in eval_set.qrels[query.query_id].items() if score > 0}
        relevance = [judged.get(hit.chunk_id, 0.0) for hit in hits]
        found.append(Candidates(query.query_id, hits, relevance, np.array([hit.doc_id in wanted for hit in hits], dtype=bool)))
    return found


def fit_snapshot(bench: Workbench, model_name: str) -> Fit:
    """Fit the weights of the newest snapshot of a model to the configured eval set. SnapshotError before its first build."""
    manifest = current_snapshot(bench, model_name)
    if manifest is None:
        raise SnapshotError(f"there is no snapshot of {model_name} yet.", fix="Build it with `ragline run`.")
    eval_set = load_eval_set(bench)
    rule = manifest.reranking() or bench.settings.rerank

    async def gathered() -> list[Candidates]:
        async with open_search(bench, manifest.snapshot_id) as search:
            return await gather(search, rule, eval_set)

    with bench.reporter.bar(f"fitting on {len(eval_set.queries)} queries"):
        candidates = asyncio.run(gathered())
    present = rule.weights if rule.method != "none" else RerankWeights(fused=1.0, relevance=0.0)
    gate = bench.settings.gate
    return fit(candidates, eval_set, present=present, distinctness=manifest.title_distinctness, k=bench.settings.eval.k, alpha=gate.alpha)


def fit(candidates: Sequence[Candidates], eval_set: EvalSet, *, present: RerankWeights, distinctness: float, k: int, alpha: float) -> Fit:
    """Fit on the tune half, and measure both halves by the order that serving would give.

    RerankError when a half is empty or the tune half has no query with a relevant candidate to tell from others.
    """
    halves = {half: [each for each in candidates if split_of(each.query_id) == half] for half in ("tune", "heldout")}
    lists = [each for each in halves["tune"] if each.relevant.any() and not each.relevant.all()]
    if not lists or not halves["heldout"]:
        raise RerankError(f"{len(candidates)} queries are too few to fit and to check.", fix="Take a larger eval set.")
    fitted = fit_weights(lists, present=present, distinctness=distinctness)
    plain = RerankWeights(fused=1.0, relevance=0.0)
    scores = {
        half: [_reciprocal_ranks(each, eval_set, weights=weights, distinctness=distinctness, k=k) for weights in (plain, present, fitted)]
        for half, each in halves.items()
    }
    tune, heldout = (
        Half(len(scores[half][0]), *(float(np.mean(list(each.values()))) for each in scores[half])) for half in ("tune", "heldout")
    )
    return Fit(fitted, tune, heldout, paired_difference(scores["heldout"][2], scores["heldout"][1], alpha=alpha))


def fit_weights(lists: Sequence[Candidates], *, present: RerankWeights, distinctness: float) -> RerankWeights:
    """The weights, rounded to two decimals, that put the relevant candidates of these lists first; those of signals begin at `present`."""
    from scipy.optimize import minimize

    longest = max(len(each.hits) for each in lists)
    features = np.zeros((len(lists), longest, len(_FEATURES) + 1))
    relevant = np.zeros((len(lists), longest), dtype=bool)
    present_at = np.zeros((len(lists), longest), dtype=bool)
    for at, each in enumerate(lists):
        rows = [
            [hit.score, judged, *evidence(hit, distinctness=distinctness).values()]
            for hit, judged in zip(each.hits, each.relevance, strict=True)
        ]
        features[at, : len(rows)], relevant[at, : len(rows)], present_at[at, : len(rows)] = rows, each.relevant, True
    start = np.array([getattr(present, name) / (present.fused or 1.0) for name in _FEATURES])

    def loss(parameters: Floats) -> tuple[float, Floats]:
        """Of the weights of all features but the fused score, and the logarithm of the temperature; with its gradient."""
        weights, heat = parameters[:-1], np.exp(parameters[-1])
        raw = features @ np.concatenate([[1.0], weights])
        scores = np.where(present_at, heat * raw, -np.inf)
        shares = np.exp(scores - scores.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        mass = np.maximum((shares * relevant).sum(axis=1, keepdims=True), 1e-300)
        pull = heat * (shares - shares * relevant / mass) / len(lists)
        gradient = np.einsum("qc,qcf->f", pull, features[:, :, 1:]) + 2 * _PULL * (weights - start)
        value = -np.log(mass).mean() + _PULL * np.square(weights - start).sum()
        return float(value), np.concatenate([gradient, [(pull * raw).sum()]])

    bounds = [(0.0, None), *[(None, None)] * len(SIGNALS), (-5.0, 5.0)]
    solved = minimize(loss, np.concatenate([start, [1.0]]), jac=True, method="L-BFGS-B", bounds=bounds)
    values: Mapping[str, float] = {name: round(float(value), 2) + 0.0 for name, value in zip(_FEATURES, solved.x[:-1], strict=True)}
    return RerankWeights(fused=1.0, **values)


def _reciprocal_ranks(
    candidates: Sequence[Candidates], eval_set: EvalSet, *, weights: RerankWeights, distinctness: float, k: int
) -> dict[str, float]:
    rankings = {}
    for each in candidates:
        ranked = reordered(each.hits, each.relevance, weights=weights, distinctness=distinctness)
        rankings[each.query_id] = document_ranking((hit.chunk_id, hit.doc_id, hit.score) for hit in ranked)
    qrels = {query_id: eval_set.qrels[query_id] for query_id in rankings}
    return {row.query_id: row.reciprocal_rank for row in score_rankings(qrels, rankings, k=k)}
