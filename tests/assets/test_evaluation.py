"""Evaluation: the served path measured, kept, and measured again when it is no longer good for evidence."""

import asyncio
import json
from dataclasses import replace

import pytest
from small_line import MODEL, build, days_ago, passages

from evals.collections import EvalSet, Query
from rag_assets.evaluation import BM25_ALONE, ann_recall, encode_queries, evaluate, measure, read_evaluation, read_rows, reciprocal_ranks
from rag_serving.encoding import LocalEncoder
from rag_serving.errors import ModelMismatch, SnapshotError, StoreError
from rag_serving.retrieval import Retriever
from rag_serving.snapshots import snapshot_key

TEXTS = passages(40)
EVAL_SET = EvalSet(
    "by hand",
    (
        Query("own words", TEXTS[17]),
        Query("own words, two judged", TEXTS[3]),
        Query("relevant far away", "topic3 and word10"),
        Query("nothing judged is there", "passage number 5"),
    ),
    {
        "own words": {"d17": 1},
        "own words, two judged": {"d3": 2, "d30": 0, "d39": 1},
        "relevant far away": {"d38": 1},
        "nothing judged is there": {"d-1": 1},
    },
)


class Encoders:
    """Hands out the hashed model and counts how often it was asked to."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self) -> LocalEncoder:
        self.asked += 1
        return LocalEncoder(MODEL)


@pytest.fixture
def measured(line):
    """A store, a manifest, and a function that evaluates with a count of encoders handed out."""
    store, (manifest, *_) = line
    encoders = Encoders()

    def run(eval_set=EVAL_SET, **changes):
        return asyncio.run(evaluate(store, manifest, eval_set, encoders, **{"k": 5, "max_age_days": 7.0, **changes}))

    return store, manifest, run, encoders


def naive_ranks(store, manifest, *, k: int, fusion=None, words_alone: bool = False):
    """Reciprocal rank of each query by plain arithmetic over what is served."""

    async def run():
        retriever = await Retriever.open(store, manifest.snapshot_id)
        ranks = {}
        for query in EVAL_SET.queries:
            vector = None if words_alone else MODEL.encode_queries([query.text])[0]
            ids = [hit.doc_id for hit in await retriever.retrieve(query.text, vector, k=100, fusion=fusion)][:k]
            relevant = [at for at, doc_id in enumerate(ids, start=1) if EVAL_SET.qrels[query.query_id].get(doc_id, 0) > 0]
            ranks[query.query_id] = 1 / relevant[0] if relevant else 0.0
        retriever.close()
        return ranks

    return asyncio.run(run())


def test_metrics_by_hand(measured):
    """MRR is the mean of reciprocal ranks of what is served: 1 for a passage's own words, 0 for a document that is not there."""
    store, manifest, run, _ = measured
    evaluation = run()
    ranks = reciprocal_ranks(store, evaluation)
    assert ranks == pytest.approx(naive_ranks(store, manifest, k=5))
    assert (ranks["own words"], ranks["own words, two judged"], ranks["nothing judged is there"]) == (1.0, 1.0, 0.0)
    assert evaluation.mrr == evaluation.metrics["mrr_at_5"] == pytest.approx(sum(ranks.values()) / 4)
    assert evaluation.metrics["queries"] == 4
    assert evaluation.metrics["success_at_1"] == pytest.approx(sum(rank == 1 for rank in ranks.values()) / 4)
    assert evaluation.metrics["latency_p95_ms"] > 0
    assert (evaluation.snapshot_id, evaluation.manifest_sha256) == (manifest.snapshot_id, manifest.sha256)
    assert evaluation.eval_set_sha256 == EVAL_SET.sha256


def test_full_text_baseline_is_measured_too(measured):
    """The BM25 figures are those of words alone on the same snapshot."""
    store, manifest, run, _ = measured
    ranks = naive_ranks(store, manifest, k=5, fusion=BM25_ALONE, words_alone=True)
    assert run().bm25["mrr_at_5"] == pytest.approx(sum(ranks.values()) / 4)


def test_rows_are_kept_by_query(measured):
    """The stored rows hold each query's rank and the documents served for it, in the eval set's order."""
    store, _, run, _ = measured
    rows = read_rows(store, run())
    assert [row["query_id"] for row in rows] == [query.query_id for query in EVAL_SET.queries]
    assert rows[0]["retrieved"][0] == "d17"
    assert all(len(row["retrieved"]) == 5 for row in rows)


def test_stored_evaluation_is_used_while_fresh(measured):
    """A second evaluation is the first one, without loading a model; so is one in a new process."""
    store, manifest, run, encoders = measured
    first, again = run(), run()
    assert encoders.asked == 1
    assert (first.reused, again.reused) == (False, True)
    assert replace(again, reused=False) == first
    assert read_evaluation(store, manifest.sha256, EVAL_SET.sha256) == again


@pytest.mark.parametrize("measured_at", [days_ago(4), days_ago(-2)], ids=["past half of its life", "from the future"])
def test_stale_evaluation_is_measured_again(measured, measured_at):
    """An evaluation too old to carry a promotion, or dated in the future, is not used."""
    store, _, run, encoders = measured
    key = f"{run().key}/summary.json"
    store.write(key, json.dumps({**json.loads(store.read(key)), "measured_at": measured_at}).encode())
    again = run()
    assert (encoders.asked, again.reused) == (2, False)
    assert reciprocal_ranks(store, again)


def test_other_k_or_eval_set_is_measured(measured):
    """Another cutoff or other judgments are another measurement."""
    _, _, run, encoders = measured
    run()
    assert "mrr_at_3" in run(k=3).metrics
    run(replace(EVAL_SET, qrels={**EVAL_SET.qrels, "own words": {"d18": 1}}))
    assert encoders.asked == 3


def test_damaged_snapshot_is_not_measured(measured):
    """A snapshot whose bytes are not the manifest's gives no evaluation."""
    store, manifest, run, encoders = measured
    (store.folder(snapshot_key(manifest.snapshot_id)) / "extra").touch()
    with pytest.raises(SnapshotError):
        run()
    assert encoders.asked == 0
    assert read_evaluation(store, manifest.sha256, EVAL_SET.sha256) is None


def test_damaged_evaluation_is_named(measured):
    """A summary or rows that cannot be read are a StoreError with the file's key."""
    store, manifest, run, _ = measured
    evaluation = run()
    rows = next(name for name in store.names(evaluation.key) if name.startswith("queries-"))
    store.write(f"{evaluation.key}/{rows}", b"damaged")
    with pytest.raises(StoreError, match=rows):
        read_rows(store, evaluation)
    (store.root / evaluation.key / rows).unlink()
    with pytest.raises(StoreError, match=rows):
        read_rows(store, evaluation)
    store.write(f"{evaluation.key}/summary.json", b"[]")
    with pytest.raises(StoreError, match=r"summary\.json"):
        read_evaluation(store, manifest.sha256, EVAL_SET.sha256)


def test_many_queries_are_measured_as_few(store):
    """Queries measured at once get the hits they get alone; progress ends at all of them; an HNSW index finds nearly every neighbour."""
    texts = passages(120)
    manifest, _ = build(store, texts, hnsw_from_rows=100)
    queries = tuple(Query(f"q{number}", texts[number % 120]) for number in range(220))
    eval_set = EvalSet("all", queries, {query.query_id: {f"d{number % 120}": 1} for number, query in enumerate(queries)})
    heard: list[tuple[int, int]] = []

    async def run():
        retriever = await Retriever.open(store, manifest.snapshot_id)
        try:
            vectors = await encode_queries(LocalEncoder(MODEL), eval_set)
            rows = await measure(retriever, vectors, eval_set, k=10, progress=lambda done, total: heard.append((done, total)))
            alone = [await retriever.retrieve(queries[number].text, vectors[number], k=10) for number in range(200, 220)]
            return rows, alone, await ann_recall(retriever, vectors, k=10)
        finally:
            retriever.close()

    rows, alone, recall = asyncio.run(run())
    assert [row.retrieved for row in rows[200:]] == [tuple(hit.doc_id for hit in hits) for hits in alone]
    assert heard == sorted(heard)
    assert heard[-1] == (220, 220)
    assert sum(row.success for row in rows) >= 210
    assert 0.95 <= recall <= 1


def test_a_known_baseline_is_not_measured_again(measured):
    """BM25 figures that are handed in are those of the evaluation."""
    _, _, run, _ = measured
    assert run(bm25={"mrr_at_5": 0.123}).bm25 == {"mrr_at_5": 0.123}


def test_a_deep_cutoff_is_filled(line):
    """At k = 100 a corpus of 150 documents gives 100 for each query: the cutoff is not cut short by how deep retrieval goes."""
    store, (*_, manifest) = line
    evaluation = asyncio.run(evaluate(store, manifest, EVAL_SET, Encoders(), k=100, max_age_days=7.0))
    assert {len(row["retrieved"]) for row in read_rows(store, evaluation)} == {100}


def test_another_model_behind_the_name_is_never_measured(line):
    """A model of the same name and dims with another fingerprint is refused before a query is searched, and nothing is stored."""
    store, (manifest, *_) = line
    other = replace(MODEL, fingerprint="0" * 64)
    with pytest.raises(ModelMismatch, match="fingerprint"):
        asyncio.run(evaluate(store, manifest, EVAL_SET, lambda: LocalEncoder(other), k=5, max_age_days=7.0))
    assert read_evaluation(store, manifest.sha256, EVAL_SET.sha256) is None


def test_an_evaluation_by_other_query_code_is_measured_again(measured, monkeypatch):
    """A stored evaluation counts only for the code that searched and ranked."""
    _, _, run, encoders = measured
    run()
    assert run().reused
    monkeypatch.setattr("rag_assets.evaluation.QUERY_CODE", "query-next")
    assert not run().reused
    assert encoders.asked == 2
