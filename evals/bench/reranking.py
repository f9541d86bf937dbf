"""What reranking gains on the sample and on public collections, and what it costs: none, MaxSim, MaxSim with fitted weights, MMR."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from evals.bench.figures import Figure
from evals.bench.quality import sample
from evals.bench.rig import Rig
from evals.collections import EvalSet
from evals.metrics import document_ranking, score_rankings, summarise
from evals.significance import paired_difference
from rag_assets import steps
from rag_assets.fitting import Candidates, Fit, fit, gather
from rag_assets.local_reranking import local_reranker
from rag_assets.searching import Search
from rag_assets.workbench import Workbench
from rag_serving.deadline import Deadline
from rag_serving.encoding import LocalEncoder
from rag_serving.ranking.diversity import Diverse
from rag_serving.reranking import Reranker, reordered
from rag_serving.retrieval import Hit, Retriever
from rag_serving.settings import Rerank, RerankWeights, Settings
from rag_serving.snapshots import Manifest
from rag_serving.store import LocalStore

COLLECTIONS = ("sample", "squad-dev", "multihop-wiki")
_DIVERSITY = 0.3
_TIMED = 100
_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Way:
    """One way to order the passages: `mrr` by query id, aggregates, and the milliseconds that it adds to a query."""

    name: str
    mrr: dict[str, float]
    metrics: dict[str, float]
    milliseconds: tuple[float, ...]


async def run(rig: Rig, *, datasets: Path | None = None, queries: int = 1000, collections: Sequence[str] = COLLECTIONS) -> list[Figure]:
    """A row a collection and way; absent collections are skipped."""
    datasets = datasets or rig.settings.root / ".." / "shared" / "datasets"
    figures: list[Figure] = []
    for name in collections:
        if name == "sample" or (datasets / name).is_dir():
            figures += await _collection(rig, "sample:" if name == "sample" else f"beir:{datasets / name}", name, most=queries)
        else:
            rig.reporter.note(f"{name} is not at {datasets.name}/{name} beside the checkout: skipped")
    return figures


async def _collection(rig: Rig, source: str, name: str, *, most: int) -> list[Figure]:
    rig.reporter.note(f"── {name}")
    settings = _settings_for(rig.settings, source)
    bench = Workbench(settings, store=LocalStore(rig.settings.home / "bench" / name), reporter=rig.reporter)
    manifest, eval_set = await asyncio.to_thread(_built, bench, rig.model_name)
    eval_set = eval_set if name == "sample" else sample(eval_set, most)
    retriever = await Retriever.open(bench.store, manifest.snapshot_id)
    encoder = LocalEncoder(bench.model(rig.model_name))
    await retriever.warm_up()
    reranker = local_reranker(bench.store, settings, retriever, encoder)
    candidates = await gather(Search(retriever, encoder, reranker), settings.rerank, eval_set)
    fitted = _fit(candidates, eval_set, settings, manifest)
    diverse = Diverse(None, retriever, pool=settings.rerank.pool, diversity=_DIVERSITY)
    weighed = partial(_weighed, distinctness=manifest.title_distinctness)
    late = await _milliseconds(reranker, candidates, eval_set) if reranker else ()
    measured = [
        _way("none", {each.query_id: each.hits for each in candidates}, eval_set, ()),
        _way("MaxSim", {each.query_id: weighed(each, settings.rerank.weights) for each in candidates}, eval_set, late),
        _way("MaxSim, fitted", {each.query_id: weighed(each, fitted.weights) for each in candidates}, eval_set, late),
        _way(
            f"MMR {_DIVERSITY}",
            {
                each.query_id: await diverse.rerank("", each.hits, k=len(each.hits), deadline=Deadline.after(_SECONDS))
                for each in candidates
            },
            eval_set,
            await _milliseconds(diverse, candidates, eval_set),
        ),
    ]
    retriever.close()
    await encoder.aclose()
    tokens = manifest.rerank["tokens"]
    rig.reporter.note(
        f"{name}: {manifest.rows:,} chunks, snapshot {manifest.bytes / 1e6:.1f} MB, of it token vectors {tokens['bytes'] / 1e6:.1f} MB; fitted "
        f"weights {fitted.weights.model_dump()}, {'kept' if fitted.kept else 'not kept'}: held-out {fitted.heldout_gain.mean:+.4f}, "
        f"lower bound {fitted.heldout_gain.lower_bound:+.4f}"
    )
    return [_figure(name, way, measured[0]) for way in measured]


def _settings_for(settings: Settings, source: str) -> Settings:
    corpus, chosen = (part.model_copy(update={"source": source}) for part in (settings.corpus, settings.eval))
    return settings.model_copy(update={"corpus": corpus, "eval": chosen, "rerank": Rerank(method="maxsim")})


def _built(bench: Workbench, model_name: str) -> tuple[Manifest, EvalSet]:
    steps.ingest_corpus(bench)
    started, before = time.perf_counter(), bench.tally["embedded"]
    manifest = steps.snapshot_corpus(bench, model_name).manifest
    bench.reporter.note(f"built in {time.perf_counter() - started:.0f} s, {bench.tally['embedded'] - before:,} texts encoded")
    return manifest, steps.load_eval_set(bench)


def _fit(candidates: list[Candidates], eval_set: EvalSet, settings: Settings, manifest: Manifest) -> Fit:
    weights, distinctness = settings.rerank.weights, manifest.title_distinctness
    return fit(candidates, eval_set, present=weights, distinctness=distinctness, k=10, alpha=settings.gate.alpha)


def _weighed(candidates: Candidates, weights: RerankWeights, *, distinctness: float) -> Sequence[Hit]:
    return reordered(candidates.hits, candidates.relevance, weights=weights, distinctness=distinctness)


def _way(name: str, orders: Mapping[str, Sequence[Hit]], eval_set: EvalSet, milliseconds: tuple[float, ...]) -> Way:
    documents = {query_id: document_ranking((hit.chunk_id, hit.doc_id, hit.score) for hit in hits) for query_id, hits in orders.items()}
    rows = score_rankings(eval_set.qrels, documents, k=10)
    return Way(name, {row.query_id: row.reciprocal_rank for row in rows}, summarise(rows, k=10), milliseconds)


async def _milliseconds(reranker: Reranker, candidates: Sequence[Candidates], eval_set: EvalSet) -> tuple[float, ...]:
    """What reranking adds to each of some queries, one after the other, with the encoding of their tokens."""
    texts = {query.query_id: query.text for query in eval_set.queries}
    took = []
    for each in candidates[:_TIMED]:
        started = time.perf_counter()
        await reranker.rerank(texts[each.query_id], each.hits, k=10, deadline=Deadline.after(_SECONDS))
        took.append((time.perf_counter() - started) * 1000)
    return tuple(took)


def _figure(collection: str, way: Way, base: Way) -> Figure:
    value, before = way.metrics["mrr_at_10"], base.metrics["mrr_at_10"]
    parts = [f"nDCG {way.metrics['ndcg_at_10']:.4f}", f"recall {way.metrics['recall_at_10']:.4f}"]
    if way is not base:
        gain = paired_difference(way.mrr, base.mrr)
        parts.append(f"{gain.mean:+.4f} ({gain.low:+.4f} to {gain.high:+.4f})")
        parts.append("p50 {:.1f}, p95 {:.1f} ms".format(*np.percentile(way.milliseconds, [50, 95])))
    what = f"{collection}: {way.name}, MRR@10"
    return Figure(what, value, "", before, "no reranking", value / max(before, 1e-9), note=", ".join(parts))
