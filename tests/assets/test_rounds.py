"""Release rounds as Dagster runs them: the promote job over real evaluations, its gates as assets, and what their checks show."""

import json
import shutil

import dagster as dg
import pytest
from dagster._core.errors import DagsterAssetCheckFailedError
from small_line import passages

from rag_assets import rounds, steps
from rag_assets.workbench import Workbench
from rag_serving.errors import PromotionRefused
from rag_serving.promotion import hold, lift, promote
from rag_serving.releases import Ledger
from rag_serving.settings import Corpus, EvalSetChoice, Gate, ModelSpec, Retrieval, Settings, Weights
from rag_serving.store import LocalStore
from rag_serving.verdicts import GATES, WARM_UP, read_verdict

ROWS = 60
STRONG, WEAK = "all-MiniLM-L6-v2", "wordllama-256"  # as configured in ragline.toml, so that the checks are theirs
DENSE = Retrieval(weights=Weights(dense_text=1, dense_title=0, bm25_text=0, bm25_title=0))
GATE = Gate(min_queries=ROWS, mrr_floor=0.3, warm_up_p95_ms=10_000, ann_recall_floor=0.5)
ASSETS = ["quality_gate", "warm_up_gate", "canary", "production_release"]


def settings_for(root, gate=GATE) -> Settings:
    models = (
        ModelSpec(name=STRONG, source="hashing:512", dims=512, max_tokens=256),
        ModelSpec(name=WEAK, source="hashing:8", dims=8, max_tokens=256),
    )
    address = f"beir:{root / 'set'}"
    choices = {"corpus": Corpus(source=address), "eval": EvalSetChoice(source=address), "retrieval": DENSE, "gate": gate}
    return Settings(root=root, models=models, default_models=(STRONG, WEAK), **choices)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A store with two evaluated snapshots of a generated collection; the weaker one has too few dimensions to tell passages apart."""
    root = tmp_path_factory.mktemp("round")
    (root / "set" / "qrels").mkdir(parents=True)
    documents = [{"_id": f"d{number}", "title": f"t{number}", "text": text} for number, text in enumerate(passages(ROWS))]
    queries = [{"_id": f"q{number}", "text": f"what tells about word{number}"} for number in range(ROWS)]
    for name, rows in (("corpus", documents), ("queries", queries)):
        (root / "set" / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    judged = ["query-id\tcorpus-id\tscore", *(f"q{number}\td{number}\t1" for number in range(ROWS))]
    (root / "set" / "qrels" / "test.tsv").write_text("\n".join(judged), encoding="utf-8")
    bench = Workbench(settings_for(root), store=LocalStore(root / "store"))
    steps.ingest_corpus(bench)
    eval_set = steps.load_eval_set(bench)
    for model in (STRONG, WEAK):
        steps.evaluate_snapshot(bench, steps.snapshot_corpus(bench, model).manifest, eval_set)
    return root


@pytest.fixture
def bench(measured, tmp_path):
    shutil.copytree(measured / "store", tmp_path / "store")
    return Workbench(settings_for(measured), store=LocalStore(tmp_path / "store"))


def promote_job(bench):
    """Run the gates and the release in one run, as the promote job does; checks by asset and name."""
    from rag_assets.defs import release

    assets = [getattr(release, name) for name in ASSETS]
    checks = [getattr(release, f"{name}_by_model") for name in ASSETS[:3]] + [release.live_snapshot_intact, release.rests_on_evidence]
    quiet = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}
    with dg.DagsterInstance.ephemeral() as instance:
        result = dg.materialize([*assets, *checks], instance=instance, resources={"bench": bench}, run_config=quiet)
    return {(check.asset_key.to_user_string(), check.check_name): check for check in result.get_asset_check_evaluations()}


def champion(bench) -> str | None:
    live = Ledger(bench.store).state().champion
    return live.snapshot_id if live else None


def test_one_job_holds_the_round_and_shows_why(bench):
    """The better model goes live, the run is green, and the weaker one's check is a FAIL with each rule's number; again changes nothing."""
    checks = promote_job(bench)
    strong, weak = (steps.current_snapshot(bench, model).snapshot_id for model in (STRONG, WEAK))
    assert champion(bench) == strong
    assert all(checks[gate, "something_passes"].passed for gate in ASSETS[:3])
    assert [checks[gate, "all_MiniLM_L6_v2"].passed for gate in ASSETS[:3]] == [True] * 3
    refused = checks["quality_gate", "wordllama_256"]
    assert (refused.passed, refused.severity) == (False, dg.AssetCheckSeverity.WARN)
    said = {name: value.value for name, value in refused.metadata.items()}
    assert (said["outcome"], said["snapshot_id"], said["compared_with"]) == ("FAIL", weak, strong)
    assert isinstance(said["non_inferiority"], float)
    assert "| non_inferiority | failed |" in said["rules"]
    assert ("warm_up_gate", "wordllama_256") not in checks
    assert checks["production_release", "rests_on_evidence"].passed
    assert checks["production_release", "live_snapshot_intact"].passed
    again = promote_job(bench)
    assert not again["quality_gate", "wordllama_256"].passed
    assert all(again[gate, "something_passes"].passed for gate in ASSETS[:3])
    assert Ledger(bench.store).last_number() == 1


def test_a_corpus_without_a_snapshot_that_passes_stops_the_job(bench, measured):
    """Nothing live and nothing good enough: the blocking check fails, no later gate runs, and nothing is released."""
    strict = Workbench(settings_for(measured, GATE.model_copy(update={"min_queries": 1000})), store=bench.store)
    with pytest.raises(DagsterAssetCheckFailedError, match="something_passes"):
        promote_job(strict)
    assert champion(bench) is None
    assert read_verdict(bench.store, steps.current_snapshot(bench, STRONG).snapshot_id, WARM_UP) is None


def test_a_slow_snapshot_stops_the_job_at_its_gate(bench, measured):
    """A contender that is too slow is refused by the warm-up gate with its milliseconds, and the canary is not reached."""
    hasty = Workbench(settings_for(measured, GATE.model_copy(update={"warm_up_p95_ms": 1e-6})), store=bench.store)
    with pytest.raises(DagsterAssetCheckFailedError, match="something_passes"):
        promote_job(hasty)
    verdict = read_verdict(bench.store, steps.current_snapshot(bench, STRONG).snapshot_id, WARM_UP)
    assert verdict.outcome == "FAIL"
    assert "ms" in verdict.summary
    assert champion(bench) is None


def test_a_hold_refuses_the_job_by_its_own_error(bench):
    """During a hold the gates still judge, and the release fails with the hold's reason."""
    hold(bench.store, actor="sensor", reason="MRR fell by 0.05")
    with pytest.raises(PromotionRefused, match=r"MRR fell by 0\.05"):
        promote_job(bench)
    assert champion(bench) is None
    lift(bench.store, actor="ana", reason="fixed")
    promote_job(bench)
    assert champion(bench)


def test_a_release_by_override_shows_in_its_check(bench, measured):
    """While an override lasts its check passes and says until when; when it expired without a PASS the check warns."""
    weak = steps.current_snapshot(bench, WEAK).snapshot_id
    brief = GATE.model_copy(update={"override_hours": 1e-9, "min_queries": 1000})
    promote(bench.store, weak, gate=GATE, actor="ana", reason="incident", override=True)
    strict = Workbench(settings_for(measured, brief), store=bench.store)
    check = promote_job(strict)["production_release", "rests_on_evidence"]
    assert check.passed
    assert "an override until" in check.metadata["stands_on"].value
    promote(bench.store, steps.current_snapshot(bench, STRONG).snapshot_id, gate=brief, actor="ana", reason="incident", override=True)
    check = promote_job(strict)["production_release", "rests_on_evidence"]
    assert (check.passed, check.severity) == (False, dg.AssetCheckSeverity.WARN)


def test_a_promotion_by_name_measures_what_is_missing(bench):
    """By model name: a snapshot that passed retrieval quality gets its later verdicts and goes live; one that failed is refused with its numbers."""
    settings = bench.settings.model_copy(update={"places": bench.settings.places.model_copy(update={"store": bench.store.root})})
    judged = rounds.open_round(bench).judge_all()
    assert {verdict.outcome for verdict in judged.values()} == {"PASS", "FAIL"}
    with pytest.raises(PromotionRefused, match="FAIL: MRR"):
        rounds.promote_named(settings, WEAK, override=False, allow_shrink=False, reason="")
    entry = rounds.promote_named(settings, STRONG, override=False, allow_shrink=False, reason="by name")
    assert entry.snapshot_id == champion(bench)
    assert [read_verdict(bench.store, entry.snapshot_id, gate).outcome for gate in GATES] == ["PASS"] * 3


def test_an_override_by_name_has_no_reason_of_its_own(bench):
    """`ragline promote NAME --override` without --reason is refused: only a person can say why evidence is set aside."""
    settings = bench.settings.model_copy(update={"places": bench.settings.places.model_copy(update={"store": bench.store.root})})
    with pytest.raises(PromotionRefused, match="needs a reason") as refusal:
        rounds.promote_named(settings, WEAK, override=True, allow_shrink=False, reason="")
    assert refusal.value.code == "override_incomplete"
    assert rounds.promote_named(settings, WEAK, override=True, allow_shrink=False, reason="incident 7").reason == "incident 7"


def test_an_evaluation_by_other_query_code_is_no_candidate(bench, monkeypatch):
    """What earlier search code measured is not what is served: it is neither judged nor compared with before it is measured again."""
    assert len(steps.current_evaluations(bench, steps.load_eval_set(bench))) == len(bench.settings.models)
    monkeypatch.setattr(steps, "QUERY_CODE", "another")
    assert steps.current_evaluations(bench, steps.load_eval_set(bench)) == []
    assert rounds.open_round(bench).judge_all() == {}


def test_a_warm_up_is_measured_once(bench):
    """A fresh PASS of the same limit is reused; another limit is measured anew."""
    eval_set = steps.load_eval_set(bench)
    (evaluation, *_) = steps.current_evaluations(bench, eval_set)
    first = rounds.judge_warm_up(bench, evaluation, eval_set)
    assert rounds.judge_warm_up(bench, evaluation, eval_set) == first
    bench.settings = bench.settings.model_copy(update={"gate": bench.settings.gate.model_copy(update={"warm_up_p95_ms": 20_000.0})})
    assert rounds.judge_warm_up(bench, evaluation, eval_set) != first
