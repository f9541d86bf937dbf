"""The harness against published numbers: SciFact through the same code that builds, searches and scores everything else."""

import asyncio
import json
from pathlib import Path

import pytest
from conftest import DATASETS, ROOT

from evals.metrics import summarise
from rag_assets import steps
from rag_assets.evaluation import read_rows
from rag_assets.measurement import BM25_ALONE, DENSE_ALONE, encode_queries, measure
from rag_assets.workbench import Workbench
from rag_serving.encoding import LocalEncoder
from rag_serving.retrieval import Retriever
from rag_serving.settings import Chunking, Retrieval, load_settings
from rag_serving.store import LocalStore

SCIFACT = DATASETS / "scifact"


needs_scifact = pytest.mark.skipif(not SCIFACT.is_dir(), reason="needs the scifact collection at ../shared/datasets/scifact")


@needs_scifact
@pytest.mark.timeout(600)
def test_full_text_agrees_with_published_scores(tmp_path):
    """SciFact's abstracts, BM25 alone: nDCG@10 of 0.67 to 0.69, as published."""
    found = scifact_ndcg(tmp_path, "wordllama-256", BM25_ALONE)
    print(f"scifact nDCG@10, BM25: {found:.4f}")
    assert 0.67 <= found <= 0.69


@needs_scifact
@pytest.mark.heavy
@pytest.mark.timeout(1800)
def test_vectors_agree_with_published_scores(tmp_path):
    """SciFact's abstracts in passages that the model reads whole, MiniLM alone: nDCG@10 of 0.64 to 0.66, as published."""
    found = scifact_ndcg(tmp_path, "all-MiniLM-L6-v2", DENSE_ALONE)
    print(f"scifact nDCG@10, MiniLM: {found:.4f}")
    assert 0.64 <= found <= 0.66


def scifact_ndcg(root: Path, model: str, fusion: Retrieval) -> float:
    """nDCG@10 of one signal on SciFact, through a snapshot built in `root`."""
    address = f"beir:{SCIFACT}"
    settings = load_settings(ROOT / "ragline.toml", environ={"RAGLINE_CORPUS": address, "RAGLINE_EVAL_SET": address})
    settings = settings.model_copy(update={"chunking": Chunking(max_tokens=8192)})
    bench = Workbench(settings, store=LocalStore(root))
    steps.ingest_corpus(bench)
    eval_set = steps.load_eval_set(bench)
    manifest = steps.snapshot_corpus(bench, model).manifest

    async def score() -> float:
        retriever = await Retriever.open(bench.store, manifest.snapshot_id)
        vectors = None if fusion is BM25_ALONE else await encode_queries(LocalEncoder(bench.model(model)), eval_set)
        rows = await measure(retriever, vectors, eval_set, k=10, fusion=fusion)
        retriever.close()
        return summarise(rows, k=10)["ndcg_at_10"]

    return asyncio.run(score())


@pytest.mark.heavy
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["squad-dev", "multihop-wiki"])
def test_two_runs_are_equal(name, tmp_path):
    """A public set run twice from nothing with exact vectors, and one HNSW snapshot of it measured twice: every metric and row is equal.

    Bit for bit, of documents and of answer spans, all but latency.
    """
    folder = DATASETS / name
    if not folder.is_dir():
        pytest.skip(f"needs the {name} collection at ../shared/datasets/{name}")
    address = f"beir:{folder}"
    settings = load_settings(ROOT / "ragline.toml", environ={"RAGLINE_CORPUS": address, "RAGLINE_EVAL_SET": address})
    exact = settings.model_copy(update={"index": settings.index.model_copy(update={"hnsw_from_rows": 1_000_000})})
    graph = Workbench(settings, store=LocalStore(tmp_path / "graph"))
    once, again = (measured(Workbench(exact, store=LocalStore(tmp_path / run))) for run in ("once", "again"))
    assert once == again
    metrics = json.loads(once)[0]
    shown = {key: round(metrics[key], 4) for key in ("mrr_at_10", "ndcg_at_10", "recall_at_10", "span_mrr_at_10", "span_recall_at_10")}
    print(f"{name}, wordllama-256, exact: {shown}")
    assert measured(graph) == measured(graph)


def measured(bench: Workbench) -> str:
    """Metrics, rows and ANN recall of a fresh measurement as JSON, without latencies; the snapshot is built where it is not there yet."""
    steps.ingest_corpus(bench)
    manifest = steps.snapshot_corpus(bench, "wordllama-256").manifest
    evaluation = steps.evaluate_snapshot(bench, manifest, steps.load_eval_set(bench), fresh=True)
    rows = [{key: value for key, value in row.items() if key != "latency_ms"} for row in read_rows(bench.store, evaluation)]
    metrics = {key: value for key, value in evaluation.metrics.items() if not key.startswith("latency")}
    return json.dumps([metrics, rows, evaluation.ann_recall])
