"""The harness against published numbers: SciFact through the same code that builds, searches and scores everything else."""

import asyncio
import json

import pytest
from conftest import DATASETS, ROOT

from evals.metrics import summarise
from rag_assets import ingestion, steps
from rag_assets.evaluation import read_rows
from rag_assets.measurement import BM25_ALONE, DENSE_ALONE, encode_queries, measure
from rag_assets.workbench import Workbench
from rag_serving.encoding import LocalEncoder
from rag_serving.retrieval import Retriever
from rag_serving.settings import Chunking, load_settings
from rag_serving.store import LocalStore

SCIFACT = DATASETS / "scifact"


@pytest.mark.timeout(900)
@pytest.mark.skipif(not SCIFACT.is_dir(), reason="needs the scifact collection at ../shared/datasets/scifact")
def test_scifact_agrees_with_published_scores(tmp_path):
    """Abstracts in passages that the model reads whole: BM25 alone has nDCG@10 of 0.67 to 0.69, MiniLM alone of 0.64 to 0.66, as published."""
    address = f"beir:{SCIFACT}"
    settings = load_settings(ROOT / "ragline.toml", environ={"RAGLINE_CORPUS": address, "RAGLINE_EVAL_SET": address})
    settings = settings.model_copy(update={"chunking": Chunking(max_tokens=8192)})
    bench = Workbench(settings, store=LocalStore(tmp_path))
    for step in (ingestion.list_source_files, ingestion.parse_documents, ingestion.split_chunks):
        step(bench)
    eval_set = steps.load_eval_set(bench)
    manifest = steps.snapshot_corpus(bench, "all-MiniLM-L6-v2").manifest

    async def scores() -> dict[str, float]:
        retriever = await Retriever.open(bench.store, manifest.snapshot_id)
        vectors = await encode_queries(LocalEncoder(bench.model("all-MiniLM-L6-v2")), eval_set)
        bm25 = await measure(retriever, None, eval_set, k=10, fusion=BM25_ALONE)
        dense = await measure(retriever, vectors, eval_set, k=10, fusion=DENSE_ALONE)
        retriever.close()
        return {name: summarise(rows, k=10)["ndcg_at_10"] for name, rows in (("bm25", bm25), ("dense", dense))}

    found = asyncio.run(scores())
    print(f"scifact nDCG@10: BM25 {found['bm25']:.4f}, MiniLM {found['dense']:.4f}")
    assert 0.67 <= found["bm25"] <= 0.69
    assert 0.64 <= found["dense"] <= 0.66


@pytest.mark.heavy
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["squad-dev", "multihop-wiki"])
def test_two_measurements_are_equal(name, tmp_path):
    """A snapshot of a public set measured twice: every metric and row, of documents and of answer spans, is equal bit for bit but for latency."""
    folder = DATASETS / name
    if not folder.is_dir():
        pytest.skip(f"needs the {name} collection at ../shared/datasets/{name}")
    address = f"beir:{folder}"
    settings = load_settings(ROOT / "ragline.toml", environ={"RAGLINE_CORPUS": address, "RAGLINE_EVAL_SET": address})
    bench = Workbench(settings, store=LocalStore(tmp_path))
    for step in (ingestion.list_source_files, ingestion.parse_documents, ingestion.split_chunks):
        step(bench)
    manifest = steps.snapshot_corpus(bench, "wordllama-256").manifest
    found = []
    for _ in range(2):
        evaluation = steps.evaluate_snapshot(bench, manifest, steps.load_eval_set(bench), fresh=True)
        rows = [{key: value for key, value in row.items() if key != "latency_ms"} for row in read_rows(bench.store, evaluation)]
        metrics = {key: value for key, value in evaluation.metrics.items() if not key.startswith("latency")}
        found.append(json.dumps([metrics, rows, evaluation.ann_recall]))
    shown = {key: round(metrics[key], 4) for key in ("mrr_at_10", "ndcg_at_10", "recall_at_10", "span_mrr_at_10", "span_recall_at_10")}
    print(f"{name}, wordllama-256: {shown}")
    assert found[0] == found[1]
