"""An eval set beside its corpus: contamination, slices, answers in chunks, and what the stored evaluations can show."""

import gzip
import json
from pathlib import Path

import pytest

from evals.collections import EvalSetError
from evals.power import queries_needed
from evals.significance import EvidenceError, paired_spread
from rag_assets import steps
from rag_assets.background import background_of, require_uncontaminated
from rag_assets.evaluation import query_slices, read_rows, reciprocal_ranks
from rag_assets.gating import judge
from rag_assets.sensitivity import reach
from rag_assets.workbench import Workbench
from rag_serving.settings import Chunking, Corpus, EvalSetChoice, Gate, ModelSpec, Places, Settings
from rag_serving.verdicts import RETRIEVAL_QUALITY, read_verdict

DATASETS = Path(__file__).resolve().parents[3] / "shared" / "datasets"
MODELS = tuple(ModelSpec(name=f"hashing-{dims}", source=f"hashing:{dims}", dims=dims, max_tokens=256) for dims in (16, 256))
ARTICLES = 60


def write_articles(folder: Path, **more: dict[str, object]) -> None:
    """Articles of three paragraphs, each about a number; a question asks for the one whose answer stands in the last paragraph."""
    (folder / "qrels").mkdir(parents=True)
    documents, queries, judged = [], [], ["query-id\tcorpus-id\tscore"]
    for number in range(ARTICLES):
        words = [f"{kind}{number}" for kind in ("alpha", "beta", "gamma")]
        text = "\n\n".join(f"The {word} is told about here, in a paragraph of its own that is long enough to be a chunk." for word in words)
        documents.append({"_id": f"d{number}", "title": f"Article {number}", "text": f"{text} Its colour is hue{number}."} | more)
        queries.append(
            {
                "_id": f"q{number}",
                "text": f"the colour of {words[2]}",
                "metadata": {"answers": [f"hue{number}"], "kind": "even" if number % 2 == 0 else "odd"},
            }
        )
        judged.append(f"q{number}\td{number}\t1")
    (folder / "corpus.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, documents)).encode()))
    (folder / "queries.jsonl").write_text("\n".join(map(json.dumps, queries)), encoding="utf-8")
    (folder / "qrels" / "test.tsv").write_text("\n".join(judged), encoding="utf-8")


def bench_for(root: Path, **more: dict[str, object]) -> Workbench:
    write_articles(root / "beir", **more)
    settings = Settings(
        root=root,
        corpus=Corpus(source="beir:beir"),
        eval=EvalSetChoice(source="beir:beir"),
        chunking=Chunking(max_tokens=30),
        gate=Gate(min_queries=30),
        models=MODELS,
        places=Places(home=root),
    )
    bench = Workbench(settings)
    steps.ingest_corpus(bench)
    return bench


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A bench over the articles with both models measured."""
    bench = bench_for(tmp_path_factory.mktemp("articles"))
    eval_set = steps.load_eval_set(bench)
    found = [steps.evaluate_snapshot(bench, steps.snapshot_corpus(bench, spec.name).manifest, eval_set) for spec in MODELS]
    return bench, eval_set, found


def test_slices_come_from_metadata_length_and_the_corpus(measured):
    """The stored rows name each query's groups: its kind, its length, and that its rarest word is in one article alone."""
    bench, _, (evaluation, _) = measured
    found = query_slices(bench.store, evaluation)
    assert found["q0"] == ("kind=even", "words=1-5", "rarest_word=rare")
    assert found["q1"] == ("kind=odd", "words=1-5", "rarest_word=rare")


def test_answers_are_scored_by_chunk(measured):
    """Span scores are of the one chunk that holds the answer, so they are at most the document's and count every query."""
    bench, eval_set, found = measured
    for evaluation in found:
        rows = read_rows(bench.store, evaluation)
        assert all(row["span_reciprocal_rank"] <= row["reciprocal_rank"] for row in rows)
        assert evaluation.metrics["span_queries"] == ARTICLES
        assert 0 < evaluation.metrics["span_mrr_at_10"] <= evaluation.mrr
    spans = background_of(bench.store, eval_set).spans
    assert {query_id: len(each) for query_id, each in spans.items()} == dict.fromkeys(spans, 1)
    assert 1 < found[1].metrics["distinct_documents_at_10"] < 10


def test_reach_is_that_of_the_stored_evaluations(measured):
    """The better model is the reference; the spread is that of the stored rows, and the needed queries follow from it."""
    bench, _, (weak, strong) = measured
    shown = reach(bench, drop=0.05)
    sd = paired_spread(reciprocal_ranks(bench.store, weak), reciprocal_ranks(bench.store, strong))
    assert shown.reference == "hashing-256"
    facts = json.loads(json.dumps(shown.facts(), allow_nan=False))
    assert (facts["queries"], facts["drop"]) == (ARTICLES, 0.05)
    assert facts["measured"]["hashing-16"]["sd"] == [sd, sd]
    assert facts["measured"]["hashing-16"]["queries_needed"] == [queries_needed(sd, 0.05)] * 2
    assert shown.table().row_count == 2
    with pytest.raises(EvidenceError, match="drop to detect"):
        reach(bench, drop=0.0).facts()


def test_reach_before_the_first_run(tmp_path):
    """Without a corpus the usual spread stands in, and nothing is compared."""
    write_articles(tmp_path / "beir")
    shown = reach(Workbench(Settings(root=tmp_path, eval=EvalSetChoice(source="beir:beir"), places=Places(home=tmp_path))), drop=0.02)
    assert (shown.reference, shown.measured, shown.usual.queries) == (None, {}, ARTICLES)
    assert shown.table().row_count == 1


def test_a_query_in_the_metadata_of_a_document_is_refused(tmp_path):
    """A question planted in any document's metadata stops the eval set before anything is measured, and names the field."""
    bench = bench_for(tmp_path, metadata={"faq": "Q: The colour of gamma7 today?"})
    (tmp_path / "beir" / "queries.jsonl").write_text(
        (tmp_path / "beir" / "queries.jsonl").read_text(encoding="utf-8").replace("gamma7", "gamma7 today"), encoding="utf-8"
    )
    with pytest.raises(EvalSetError, match=r"contaminated.*'the colour of gamma7 today'.*metadata") as raised:
        steps.load_eval_set(bench)
    assert raised.value.code == "contaminated"


def test_a_clean_corpus_has_no_leak(measured):
    """Questions in words of their own are not found in titles, texts or metadata."""
    bench, eval_set, _ = measured
    assert require_uncontaminated(bench.store, eval_set) == ()


def test_the_verdict_judges_the_stored_slices(measured):
    """The weaker model's verdict has the slice rule, with the loss of the worst group by plain arithmetic; no eval set is asked for."""
    bench, _, (weak, strong) = measured
    verdict = judge(bench.store, weak, strong, gate=Gate(min_queries=30, slice_min_queries=30))
    before, after = reciprocal_ranks(bench.store, strong), reciprocal_ranks(bench.store, weak)
    kinds = [[f"q{number}" for number in range(first, ARTICLES, 2)] for first in (0, 1)]
    worst = min(sum(after[each] - before[each] for each in ids) / len(ids) for ids in kinds)
    (rule,) = (rule for rule in verdict.rules if rule["name"] == "no_slice_worse")
    assert (rule["observed"], rule["required"]) == (pytest.approx(worst), -0.05)
    assert "kind=" in rule["detail"]
    assert read_verdict(bench.store, weak.snapshot_id, RETRIEVAL_QUALITY) == verdict


@pytest.mark.heavy
@pytest.mark.timeout(900)
@pytest.mark.skipif(not DATASETS.is_dir(), reason="needs the collections at ../shared/datasets")
def test_long_papers_are_told_apart_by_span_scores(tmp_path):
    """On COVID-QA the right paper is found far more often than the passage that holds the answer: document scores alone hide it."""
    address = f"beir:{DATASETS / 'covidqa-long'}"
    settings = Settings(
        root=tmp_path, corpus=Corpus(source=address), eval=EvalSetChoice(source=address), models=MODELS[1:], places=Places(home=tmp_path)
    )
    bench = Workbench(settings)
    steps.ingest_corpus(bench)
    evaluation = steps.evaluate_snapshot(bench, steps.snapshot_corpus(bench, "hashing-256").manifest, steps.load_eval_set(bench))
    print({name: round(value, 4) for name, value in evaluation.metrics.items()})
    assert evaluation.metrics["span_queries"] == 1_380
    assert 0.1 < evaluation.metrics["span_mrr_at_10"] < evaluation.metrics["mrr_at_10"] - 0.05
    rows = read_rows(bench.store, evaluation)
    assert all(row["span_reciprocal_rank"] <= row["reciprocal_rank"] for row in rows)
