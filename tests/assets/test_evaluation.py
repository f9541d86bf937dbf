"""Evaluation: the served path measured, kept, and measured again when it is no longer good for evidence."""

import asyncio
import hashlib
import io
import json
import math
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
from small_line import MODEL, build, days_ago, passages

from evals.collections import AnswerSpan, EvalSet, Query
from evals.metrics import QueryRow
from evals.significance import EvidenceError
from rag_assets.background import Background
from rag_assets.evaluation import (
    evaluate,
    evaluation_history,
    query_slices,
    read_evaluation,
    read_rows,
    reciprocal_ranks,
    write_evaluation,
)
from rag_assets.measurement import BM25_ALONE, ann_recall, encode_queries, measure
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


def query_rows(store, evaluation):
    """The stored rows as they were scored."""
    return [QueryRow(**row) for row in read_rows(store, evaluation)]


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
    first = run()
    write_evaluation(store, replace(first, measured_at=measured_at), query_rows(store, first))
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
    with pytest.raises(StoreError, match=f"{rows} is not what was measured"):
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


def test_slices_and_answers_are_kept_with_the_rows(measured):
    """Each row has its slices and its span scores, so that a verdict needs no eval set; a chunk counts if it holds a whole answer."""
    store, _, run, _ = measured
    words = TEXTS[17].split()
    inside, beyond = AnswerSpan("d17", 0, len(words[0])), AnswerSpan("d3", 0, len(TEXTS[3]) + 1)
    known = Background({"own words": ("words=6-10",)}, {"own words": (inside,), "own words, two judged": (beyond,)})
    evaluation = run(background=lambda: known)
    assert query_slices(store, evaluation) == {query.query_id: known.slices.get(query.query_id, ()) for query in EVAL_SET.queries}
    scores = {row["query_id"]: (row["span_reciprocal_rank"], row["span_recall"]) for row in read_rows(store, evaluation)}
    assert scores["own words"] == (1.0, 1.0)
    assert scores["own words, two judged"] == (0.0, 0.0)
    assert scores["relevant far away"] == (None, None)
    assert (evaluation.metrics["span_mrr_at_5"], evaluation.metrics["span_queries"]) == (0.5, 2)


def test_the_background_is_read_only_to_measure(measured):
    """A stored evaluation is returned without reading the corpus again."""
    _, _, run, _ = measured
    run()

    def unexpected():
        raise AssertionError("the corpus was read although nothing is measured")

    assert run(background=unexpected).reused


def test_diversity_is_measured(measured):
    """Forty documents of one chunk: five passages are five documents; similarity and skewness are those of what is served."""
    store, manifest, run, _ = measured
    metrics = run().metrics
    assert metrics["distinct_documents_at_5"] == 5
    hits, vectors = served_hits(store, manifest, k=5)
    cosines = [[float(vectors[a] @ vectors[b]) for at, a in enumerate(found) for b in found[:at]] for found in hits]
    assert metrics["intra_list_similarity_at_5"] == pytest.approx(sum(sum(each) / len(each) for each in cosines) / len(cosines), abs=1e-5)
    assert metrics["hubness_at_5"] > 0


def served_hits(store, manifest, *, k: int):
    """Chunk ids served for each query, and the vector of every chunk: the model's, of title and text."""

    async def run():
        retriever = await Retriever.open(store, manifest.snapshot_id)
        found = [await retriever.retrieve(query.text, MODEL.encode_queries([query.text])[0], k=k) for query in EVAL_SET.queries]
        retriever.close()
        return found

    found = asyncio.run(run())
    hits = {hit.chunk_id: hit for each in found for hit in each}
    vectors = dict(zip(hits, MODEL.encode_documents([f"{hit.title}\n{hit.text}" for hit in hits.values()]), strict=True))
    return [[hit.chunk_id for hit in each] for each in found], vectors


@pytest.mark.parametrize(
    "change", [{"ann_recall": 0.999}, {"metrics": {"mrr_at_5": 0.99}}, {"measured_at": days_ago(0.5)}, {"rows_sha256": "0" * 64}]
)
def test_an_edited_summary_is_an_error(measured, change):
    """A number changed by hand is a StoreError that names the file, also when everything still looks right."""
    store, manifest, run, _ = measured
    key = f"{run().key}/summary.json"
    store.write(key, json.dumps({**json.loads(store.read(key)), **change}).encode())
    with pytest.raises(StoreError, match=r"summary\.json was edited"):
        read_evaluation(store, manifest.sha256, EVAL_SET.sha256)
    with pytest.raises(StoreError, match="edited"):
        run()


def test_edited_rows_are_an_error(measured):
    """Rows that were made better by hand are not the rows that were measured."""
    store, _, run, _ = measured
    evaluation = run()
    name = next(name for name in store.names(evaluation.key) if name.startswith("queries-"))
    table = pq.read_table(io.BytesIO(store.read(f"{evaluation.key}/{name}"))).to_pylist()
    buffer = io.BytesIO()
    pq.write_table(pq.read_table(io.BytesIO(store.read(f"{evaluation.key}/{name}"))).slice(0, len(table) - 1), buffer)
    store.write(f"{evaluation.key}/{name}", buffer.getvalue())
    with pytest.raises(StoreError, match=f"{name} is not what was measured"):
        reciprocal_ranks(store, evaluation)


def resealed(store, evaluation, **changes):
    """A summary with `changes`, sealed anew, as faulty code might have written it."""
    key = f"{evaluation.key}/summary.json"
    fields = {**json.loads(store.read(key)), **changes}
    fields.pop("seal")
    fields["seal"] = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
    store.write(key, json.dumps(fields).encode())


@pytest.mark.parametrize(
    "changes",
    [{"ann_recall": math.nan}, {"ann_recall": 1.2}, {"metrics": {"mrr_at_5": 1.5}}, {"metrics": {"mrr_at_5": 0.5, "ndcg_at_5": math.nan}}],
)
def test_impossible_numbers_are_no_evidence(measured, changes):
    """NaN and values beyond 1 are refused even in a summary whose seal is right."""
    store, manifest, run, _ = measured
    resealed(store, run(), **changes)
    with pytest.raises(StoreError, match="impossible numbers"):
        read_evaluation(store, manifest.sha256, EVAL_SET.sha256)


def test_negative_latency_is_no_evidence(measured, monkeypatch):
    """A clock that runs backwards gives an error and stores nothing."""
    store, manifest, run, _ = measured
    ticks = iter(range(100, 0, -1))
    monkeypatch.setattr("rag_assets.measurement.time.perf_counter", lambda: float(next(ticks)))
    with pytest.raises(EvidenceError, match=r"took -\d000\.0 ms"):
        run()
    assert read_evaluation(store, manifest.sha256, EVAL_SET.sha256) is None


def test_an_evaluation_by_earlier_code_is_measured_again(measured):
    """What earlier code stored, without a seal or with another code version, is as if absent: measured again, not an error."""
    store, manifest, run, encoders = measured
    key = f"{run().key}/summary.json"
    fields = json.loads(store.read(key))
    earlier = {name: value for name, value in fields.items() if name not in ("seal", "rows_sha256", "measure_code")}
    store.write(key, json.dumps(earlier).encode())
    assert read_evaluation(store, manifest.sha256, EVAL_SET.sha256) is None
    assert not run().reused
    assert encoders.asked == 2


def test_history_keeps_every_measurement(measured):
    """Measured afresh, both measurements stay readable with their own rows, oldest first."""
    store, manifest, run, _ = measured
    first = run()
    older = write_evaluation(store, replace(first, measured_at=days_ago(1)), query_rows(store, first)[:2])
    latest = run(fresh=True)
    history = evaluation_history(store, manifest.sha256, EVAL_SET.sha256)
    assert history[0].measured_at == older.measured_at
    assert history[-1].measured_at == latest.measured_at
    assert [len(read_rows(store, each)) for each in (history[0], history[-1])] == [2, 4]
