"""Retrieval quality on public collections: ours against each of its parts alone, and the parts against what was published for them."""

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np

from evals.bench.figures import Figure
from evals.bench.rig import Rig
from evals.collections import EvalSet
from evals.metrics import summarise
from rag_assets import steps
from rag_assets.measurement import BM25_ALONE, DENSE_ALONE, measure
from rag_assets.workbench import Workbench
from rag_serving.retrieval import Retriever
from rag_serving.settings import Settings
from rag_serving.store import LocalStore

COLLECTIONS = ("scifact", "multihop-wiki", "squad-dev")
PUBLISHED = {"scifact": {"BM25": 0.679, "dense": 0.645}}  # nDCG@10 of Lucene BM25 (BEIR, Thakur et al. 2021) and of all-MiniLM-L6-v2
_METRICS = {"mrr_at_10": "MRR@10", "ndcg_at_10": "nDCG@10", "recall_at_10": "R@10"}


async def run(rig: Rig, *, datasets: Path | None = None, queries: int = 1500) -> list[Figure]:
    """A row a collection and metric: ours fused, beside the better of its BM25 and its text vectors alone. Absent collections are skipped."""
    datasets = datasets or rig.settings.root / ".." / "shared" / "datasets"
    figures: list[Figure] = []
    for name in COLLECTIONS:
        if not (datasets / name).is_dir():
            rig.reporter.note(f"{name} is not at {datasets.name}/{name} beside the checkout: skipped")
            continue
        figures += await _collection(rig, datasets / name, most=queries)
    return figures


async def _collection(rig: Rig, folder: Path, *, most: int) -> list[Figure]:
    rig.reporter.note(f"── {folder.name}")
    bench = Workbench(
        _settings_for(rig.settings, folder), store=LocalStore(rig.settings.home / "bench" / folder.name), reporter=rig.reporter
    )

    def snapshot() -> tuple[str, EvalSet]:
        steps.ingest_corpus(bench)
        return steps.snapshot_corpus(bench, rig.model_name).manifest.snapshot_id, steps.load_eval_set(bench)

    snapshot_id, every = await asyncio.to_thread(snapshot)
    eval_set = sample(every, most)
    vectors = bench.model(rig.model_name).encode_queries([query.text for query in eval_set.queries])
    retriever = await Retriever.open(bench.store, snapshot_id)
    await retriever.warm_up()
    scores = {}
    for kind, fusion in (("ours", None), ("BM25", BM25_ALONE), ("dense", DENSE_ALONE)):
        with rig.reporter.bar(f"{folder.name}: {kind}") as bar:
            scores[kind] = summarise(await measure(retriever, vectors, eval_set, k=10, fusion=fusion, progress=bar), k=10)
    retriever.close()
    rig.reporter.note(f"{folder.name}: nDCG@10 " + ", ".join(f"{kind} {found['ndcg_at_10']:.3f}" for kind, found in scores.items()))
    rows = []
    for metric, label in _METRICS.items():
        ours, parts = scores["ours"][metric], {kind: scores[kind][metric] for kind in ("BM25", "dense")}
        best = max(parts, key=parts.__getitem__)
        note = ", ".join(f"{kind} alone {value:.3f}" for kind, value in parts.items())
        what = f"{folder.name}: fused {label}"
        rows.append(Figure(what, ours, "", parts[best], f"{best} alone", ours / max(parts[best], 1e-9), note=note))
    rows[0] = replace(rows[0], note=f"{rows[0].note}; {len(eval_set.queries):,} queries")
    for kind, published in PUBLISHED.get(folder.name, {}).items():
        found = scores[kind]["ndcg_at_10"]
        rows.append(Figure(f"{folder.name}: {kind} alone nDCG@10", found, "", published, "published", found / published))
    return rows


def _settings_for(settings: Settings, folder: Path) -> Settings:
    address = f"beir:{folder.resolve()}"
    return settings.model_copy(
        update={
            "corpus": settings.corpus.model_copy(update={"source": address}),
            "eval": settings.eval.model_copy(update={"source": address}),
        }
    )


def sample(eval_set: EvalSet, most: int) -> EvalSet:
    """All queries, or `most` of them drawn with seed 0, in their order."""
    if len(eval_set.queries) <= most:
        return eval_set
    chosen = np.sort(np.random.default_rng(0).choice(len(eval_set.queries), size=most, replace=False))
    queries = tuple(eval_set.queries[at] for at in chosen)
    return EvalSet(eval_set.name, queries, {query.query_id: eval_set.qrels[query.query_id] for query in queries})
