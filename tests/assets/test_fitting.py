"""Fitted reranking weights: learnt on one half of an eval set, believed only when the other half agrees."""

import json
from pathlib import Path

import numpy as np
import pytest
from small_line import passages
from typer.testing import CliRunner

from evals.collections import EvalSet, Query, split_of
from rag_assets import steps
from rag_assets.cli import app
from rag_assets.fitting import Candidates, fit, fit_weights
from rag_assets.workbench import Workbench
from rag_serving.errors import RerankError
from rag_serving.retrieval import Hit
from rag_serving.settings import RerankWeights, load_settings

PRESENT = RerankWeights(fused=1.0, relevance=0.0)


def collection(queries: int, *, informative: bool, seed: int = 0):
    """Candidates whose relevance tells the relevant one apart, or tells nothing; the fused score is noise. And their eval set."""
    rng = np.random.default_rng(seed)
    found, qrels = [], {}
    for number in range(queries):
        query_id, wanted = f"q{number}", int(rng.integers(8))
        hits = [Hit(f"c{number}-{at}", f"d{at}", "u", "", "", "t", 0, 1, score, {}) for at, score in enumerate(sorted(rng.random(8))[::-1])]
        relevance = rng.random(8) * 0.5 + (0.5 * (np.arange(8) == wanted) if informative else 0)
        found.append(Candidates(query_id, hits, relevance.tolist(), np.arange(8) == wanted))
        qrels[query_id] = {f"d{wanted}": 1}
    return found, EvalSet("made", tuple(Query(query_id, query_id) for query_id in qrels), qrels)


def fitted(found, eval_set):
    return fit(found, eval_set, present=PRESENT, distinctness=1.0, k=10, alpha=0.05)


def test_a_signal_that_tells_is_weighed_and_kept():
    """Relevance that marks the right passage gets a high weight, both halves gain, and the held-out half bears it out."""
    result = fitted(*collection(200, informative=True))
    assert result.weights.relevance > 1
    assert result.weights.fused == 1
    assert result.tune.fitted > result.tune.present + 0.1
    assert result.heldout.fitted > result.heldout.present + 0.1
    assert result.kept


def test_a_signal_that_says_nothing_is_not_kept():
    """Weights fitted to noise are not offered, over several draws of the noise."""
    assert [fitted(*collection(200, informative=False, seed=seed)).kept for seed in range(5)] == [False] * 5


def test_the_held_out_half_has_no_part_in_the_fit():
    """Turning every judgment of the held-out half around leaves the fitted weights as they are, and they are no longer kept."""
    found, eval_set = collection(200, informative=True)
    wrong = {query_id: {f"d{(int(next(iter(row))[1:]) + 4) % 8}": 1} for query_id, row in eval_set.qrels.items()}
    turned = {query_id: wrong[query_id] if split_of(query_id) == "heldout" else row for query_id, row in eval_set.qrels.items()}
    candidates = [
        each if split_of(each.query_id) == "tune" else Candidates(each.query_id, each.hits, each.relevance, np.roll(each.relevant, 4))
        for each in found
    ]
    before = fitted(found, eval_set)
    after = fitted(candidates, EvalSet("turned", eval_set.queries, turned))
    assert after.weights == before.weights
    assert (before.kept, after.kept) == (True, False)


def test_the_gradient_leads_down():
    """Fitted weights put the relevant candidates higher on their own lists than the weights where the fit began."""
    found, eval_set = collection(120, informative=True, seed=3)
    weights = fit_weights(found, present=PRESENT, distinctness=1.0)
    result = fit(found, eval_set, present=weights, distinctness=1.0, k=10, alpha=0.05)
    assert result.tune.present > result.tune.fused
    assert result.weights.relevance == pytest.approx(weights.relevance, rel=0.5)


def test_too_few_queries_are_refused():
    """One query fits nothing: the error says how many there were."""
    found, eval_set = collection(1, informative=True)
    with pytest.raises(RerankError, match="1 queries are too few"):
        fitted(found, eval_set)


@pytest.fixture
def project(tmp_path: Path, monkeypatch) -> Path:
    """A small BEIR collection with a hashed model and late interaction, built."""
    texts = passages(30)
    (tmp_path / "set" / "qrels").mkdir(parents=True)
    lines = [json.dumps({"_id": f"d{at}", "title": "", "text": text}) for at, text in enumerate(texts)]
    (tmp_path / "set" / "corpus.jsonl").write_text("\n".join(lines), encoding="utf-8")
    queries = [json.dumps({"_id": f"q{at}", "text": f"what tells about word{at}"}) for at in range(30)]
    (tmp_path / "set" / "queries.jsonl").write_text("\n".join(queries), encoding="utf-8")
    judgments = ["query-id\tcorpus-id\tscore", *(f"q{at}\td{at}\t1" for at in range(30))]
    (tmp_path / "set" / "qrels" / "test.tsv").write_text("\n".join(judgments), encoding="utf-8")
    (tmp_path / "ragline.toml").write_text(
        'default_models = ["hashing"]\n[corpus]\nsource = "beir:set"\n[eval]\nsource = "beir:set"\n[rerank]\nmethod = "maxsim"\n'
        '[[models]]\nname = "hashing"\nsource = "hashing:64"\ndims = 64\nmax_tokens = 128\n',
        encoding="utf-8",
    )
    monkeypatch.setenv("RAGLINE_CONFIG", str(tmp_path / "ragline.toml"))
    bench = Workbench(load_settings(tmp_path / "ragline.toml"))
    steps.ingest_corpus(bench)
    manifest = steps.snapshot_corpus(bench, "hashing").manifest
    assert manifest.rerank["rule"]["method"] == "maxsim"
    return tmp_path


def test_the_command_says_what_it_found(project):
    """`ragline fit` measures the newest snapshot's own reranker and prints both halves; it writes nothing."""
    before = sorted(path for path in project.rglob("*") if path.is_file())
    shown = CliRunner().invoke(app, ["fit", "--json"], catch_exceptions=False)
    facts = json.loads(shown.stdout)
    assert facts["tune"]["queries"] + facts["heldout"]["queries"] == 30
    assert facts["kept"] == (facts["heldout_gain"]["lower_bound"] > 0)
    assert set(facts["weights"]) == set(RerankWeights.model_fields)
    assert sorted(path for path in project.rglob("*") if path.is_file()) == before
    text = CliRunner().invoke(app, ["fit"], catch_exceptions=False).stdout
    assert "held-out" in text


def test_a_second_build_encodes_nothing(project):
    """With token vectors stored, building again finds the snapshot, and no text is encoded."""
    bench = Workbench(load_settings(project / "ragline.toml"))
    built = steps.snapshot_corpus(bench, "hashing")
    assert (built.reused, bench.tally["embedded"]) == (True, 0)
