"""A release round on real evaluations: who is promoted, who is refused, and that a second round changes nothing."""

import asyncio
import json
import shutil
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from small_line import MODEL, build, passages

from evals.collections import EvalSet, Query
from evals.significance import EvidenceError
from rag_assets.evaluation import evaluate
from rag_assets.gating import Round, judge, judge_canary, keep_verdict, standings
from rag_assets.warmup import WarmUp, warm_up, warm_up_gate
from rag_serving.encoding import LocalEncoder
from rag_serving.errors import PromotionRefused, SnapshotError
from rag_serving.promotion import hold, override_of, promote, rollback
from rag_serving.releases import Ledger
from rag_serving.settings import Gate, Retrieval, Weights
from rag_serving.snapshots import hash_tree
from rag_serving.store import LocalStore
from rag_serving.verdicts import CANARY, GATES, RETRIEVAL_QUALITY, WARM_UP, read_verdict, write_verdict

ROWS = 40
GATE = Gate(min_queries=30, warm_up_p95_ms=10_000)
WORDS_FIRST = Retrieval(weights=Weights(dense_text=0.01, dense_title=0, bm25_text=1, bm25_title=0))
TITLES_ALONE = Retrieval(weights=Weights(dense_text=0, dense_title=1, bm25_text=0, bm25_title=0))
EVAL_SET = EvalSet(
    "words",
    tuple(Query(f"q{number}", f"what tells about word{number}") for number in range(ROWS)),
    {f"q{number}": {f"d{number}": 1} for number in range(ROWS)},
)


def _evaluate(store, manifest):
    return asyncio.run(evaluate(store, manifest, EVAL_SET, lambda: LocalEncoder(MODEL), k=10, max_age_days=7.0))


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """Evaluations of a strong and a weak snapshot of one corpus, and of a strong one of a larger corpus."""
    root = tmp_path_factory.mktemp("evaluated")
    store = LocalStore(root)
    strong, _ = build(store, passages(ROWS), retrieval=WORDS_FIRST)
    weak, _ = build(store, passages(ROWS), retrieval=TITLES_ALONE)
    larger, _ = build(store, passages(ROWS + 1), retrieval=WORDS_FIRST)
    return root, [_evaluate(store, manifest) for manifest in (strong, weak, larger)]


@pytest.fixture
def gated(evaluated, tmp_path):
    shutil.copytree(evaluated[0], tmp_path / "gated")
    return LocalStore(tmp_path / "gated"), *evaluated[1]


def unexpected(snapshot_id):
    raise AssertionError(f"{snapshot_id} was measured although its evaluation was given")


SLOW = WarmUp(0.1, (50.0, 51.0, 52.0))


def open_round(store, *evaluations, measured=unexpected, gate=GATE, slow=()):
    """A round that really warms snapshots up, but for those in `slow`, of which 51 ms were measured."""
    vectors = MODEL.encode_queries([query.text for query in EVAL_SET.queries])

    def warm(candidate):
        found = SLOW if candidate.snapshot_id in slow else asyncio.run(warm_up(store, candidate.snapshot_id, vectors, limit_ms=10_000))
        return keep_verdict(
            store, warm_up_gate(found, limit_ms=10 if found is SLOW else 10_000), candidate, champion=None, measured_at=now()
        )

    return Round(store, evaluations, gate, measured, warm)


def round_of(store, *evaluations, **changes):
    return open_round(store, *evaluations, **changes).promote_best(actor="tester")


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def live(store) -> str | None:
    champion = Ledger(store).state().champion
    return champion.snapshot_id if champion else None


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_best_goes_live_and_the_weaker_is_refused_with_numbers(gated, order):
    """Whatever the order they come in, the best is promoted and the weaker one refused, its reason naming both figures."""
    store, *found = gated
    strong, weak, _ = found
    entry = round_of(store, *(found[at] for at in order))
    assert entry.snapshot_id == live(store) == strong.snapshot_id
    assert entry.evidence["verdict"]["outcome"] == "PASS"
    verdict = read_verdict(store, weak.snapshot_id, RETRIEVAL_QUALITY)
    assert (verdict.outcome, verdict.champion) == ("FAIL", strong.snapshot_id)
    assert f"{weak.mrr:.3f}" in verdict.summary
    assert f"{strong.mrr:.3f}" in verdict.summary
    assert [standing.status for standing in standings(store, [weak, strong])] == ["champion", "refused"]


def test_a_second_round_changes_nothing(gated):
    """The same evaluations once more: no entry, and every byte of the store as it was."""
    store, strong, weak, _ = gated
    round_of(store, strong, weak)
    before = hash_tree(store.root)
    assert open_round(store, strong, weak).judge_all().keys() == {weak.snapshot_id}
    assert (open_round(store, strong, weak).warm_ups(), open_round(store, strong, weak).canaries()) == ({}, {})
    assert round_of(store, strong, weak) is None
    assert hash_tree(store.root) == before


def test_another_corpus_is_promoted_at_equal_quality(gated):
    """A snapshot of a changed corpus brings something even when its MRR is not higher; the same corpus at equal MRR does not."""
    store, strong, _, larger = gated
    round_of(store, strong)
    equal = replace(larger, corpus_sha256=strong.corpus_sha256, metrics={**larger.metrics, "mrr_at_10": strong.mrr})
    assert round_of(store, strong, equal) is None
    assert round_of(store, strong, larger).snapshot_id == larger.snapshot_id


def test_a_champion_that_is_no_candidate_is_measured(gated):
    """When the live snapshot is not among the evaluations, it is measured once for each candidate and compared with."""
    store, strong, weak, larger = gated
    round_of(store, larger)
    asked: list[str] = []

    def on_demand(snapshot_id):
        asked.append(snapshot_id)
        return larger

    assert round_of(store, weak, measured=on_demand) is None
    assert set(asked) == {larger.snapshot_id}
    assert read_verdict(store, weak.snapshot_id, RETRIEVAL_QUALITY).champion == larger.snapshot_id
    assert live(store) == larger.snapshot_id
    assert strong.snapshot_id not in asked


def test_nothing_good_enough(gated):
    """When no evaluation reaches the floor, or there are too few queries, nothing goes live and each says why."""
    store, strong, weak, _ = gated
    assert round_of(store, weak) is None
    assert round_of(store, strong, gate=Gate(min_queries=300)) is None
    assert live(store) is None
    assert [standing.status for standing in standings(store, [strong, weak])] == ["inconclusive", "refused"]


def test_unjudged_is_said(gated):
    """Before the gate ran a snapshot stands as unjudged, and one promoted by override as champion."""
    store, strong, weak, _ = gated
    promote(store, strong.snapshot_id, gate=GATE, actor="tester", reason="first", override=True)
    assert [(each.status, each.reason) for each in standings(store, [weak, strong])] == [
        ("champion", "release 1; promoted by override"),
        ("unjudged", "no verdict on this eval set yet"),
    ]


def test_a_hold_stops_a_round(gated):
    """During a hold a round that would promote is refused, and the verdict is there for when it is lifted."""
    store, strong, *_ = gated
    hold(store, actor="tester", reason="drift")
    with pytest.raises(PromotionRefused, match="a hold blocks every promotion"):
        round_of(store, strong)
    assert read_verdict(store, strong.snapshot_id, RETRIEVAL_QUALITY).outcome == "PASS"
    assert live(store) is None


def test_an_edited_verdict_is_given_anew(gated):
    """Evaluating again replaces a verdict that was edited, as the refusal advises."""
    store, strong, *_ = gated
    verdict = judge(store, strong, None, gate=GATE)
    key = f"verdicts/{strong.snapshot_id}/{RETRIEVAL_QUALITY}.json"
    store.write(key, json.dumps({**json.loads(store.read(key)), "outcome": "FAIL"}).encode())
    assert judge(store, strong, None, gate=GATE) == verdict == read_verdict(store, strong.snapshot_id, RETRIEVAL_QUALITY)


def test_a_verdict_follows_its_champion(gated):
    """Judging again against another champion replaces the verdict, so the old comparison promotes nothing."""
    store, strong, weak, _ = gated
    judge(store, weak, None, gate=GATE)
    judge(store, weak, strong, gate=GATE)
    assert read_verdict(store, weak.snapshot_id, RETRIEVAL_QUALITY).champion == strong.snapshot_id
    write_verdict(store, replace(judge(store, strong, None, gate=GATE), outcome="FAIL"))
    assert round_of(store, strong).snapshot_id == strong.snapshot_id


@pytest.mark.parametrize("change", [{"eval_set_sha256": "f" * 64}, {"k": 5}])
def test_other_eval_set_is_no_comparison(gated, change):
    """A champion measured on another eval set or at another k is not compared with, by no gate: equal query ids are no equal judgments."""
    store, strong, weak, _ = gated
    with pytest.raises(EvidenceError, match="another eval set or k"):
        judge(store, weak, replace(strong, **change), gate=GATE)
    with pytest.raises(EvidenceError, match="another eval set or k"):
        judge_canary(store, weak, replace(strong, **change), gate=GATE)
    assert [read_verdict(store, weak.snapshot_id, gate) for gate in (RETRIEVAL_QUALITY, CANARY)] == [None, None]


def test_a_rolled_back_snapshot_waits_to_be_promoted_by_name(gated):
    """A release round does not bring back what was rolled back, and says so; promoting it by name ends that."""
    store, strong, weak, larger = gated
    round_of(store, strong)
    round_of(store, strong, larger)
    rollback(store, actor="tester", reason="users complain")
    assert round_of(store, strong, weak, larger) is None
    assert live(store) == strong.snapshot_id
    assert {standing.evaluation.snapshot_id: standing.status for standing in standings(store, [strong, larger])} == {
        strong.snapshot_id: "champion",
        larger.snapshot_id: "withdrawn",
    }
    assert promote(store, larger.snapshot_id, gate=GATE, actor="tester", reason="tried again")
    assert Ledger(store).state().withdrawn == frozenset()


def test_a_hold_refuses_the_round_after_everything_was_judged(gated):
    """Under a hold nothing is promoted, the refusal names it, and every snapshot has its verdict."""
    store, strong, weak, _ = gated
    hold(store, actor="keeper", reason="freeze")
    with pytest.raises(PromotionRefused, match="freeze"):
        round_of(store, strong, weak)
    assert live(store) is None
    assert [standing.status for standing in standings(store, [strong, weak])] == ["passed", "refused"]


def test_the_gates_held_one_by_one_say_what_the_round_says(gated):
    """Gate by gate, as the assets run them: both are judged, the weaker against the better, the better goes on, and the release follows."""
    store, strong, weak, _ = gated
    judged = open_round(store, weak, strong).judge_all()
    assert {snapshot_id: (verdict.outcome, verdict.champion) for snapshot_id, verdict in judged.items()} == {
        strong.snapshot_id: ("PASS", None),
        weak.snapshot_id: ("FAIL", strong.snapshot_id),
    }
    assert open_round(store, weak, strong).warm_ups().keys() == {strong.snapshot_id}
    canaries = open_round(store, weak, strong).canaries()
    assert {snapshot_id: verdict.outcome for snapshot_id, verdict in canaries.items()} == {strong.snapshot_id: "PASS"}
    assert "nothing is live" in canaries[strong.snapshot_id].summary
    entry = round_of(store, weak, strong)
    assert (entry.snapshot_id, [entry.evidence[gate]["outcome"] for gate in (WARM_UP, CANARY)]) == (strong.snapshot_id, ["PASS", "PASS"])


def test_a_failed_warm_up_keeps_a_good_snapshot_from_going_live(gated):
    """The best by MRR that answers too slowly stands as refused with its milliseconds, and the round promotes nothing."""
    store, strong, *_ = gated
    assert round_of(store, strong, slow={strong.snapshot_id}) is None
    assert live(store) is None
    (standing,) = standings(store, [strong])
    assert standing.status == "refused"
    assert "51.00 ms" in standing.reason
    assert open_round(store, strong, slow={strong.snapshot_id}).canaries() == {}
    with pytest.raises(PromotionRefused, match="p95 of vector search") as refusal:
        promote(store, strong.snapshot_id, gate=GATE, actor="tester", reason="by hand")
    assert refusal.value.code == "verdict_failed"


def test_the_next_best_gets_its_chance(gated):
    """When the best fails a later gate, the next that passes retrieval quality against the champion is tried in the same round."""
    store, strong, weak, _ = gated
    lenient = GATE.model_copy(update={"mrr_floor": 0.0, "ann_recall_floor": 0.0, "margin": 0.9})
    second = replace(weak, bm25=dict.fromkeys(weak.bm25, 0.0))

    round_ = open_round(store, strong, second, gate=lenient, slow={strong.snapshot_id})
    assert [verdict.outcome for verdict in round_.warm_ups().values()] == ["FAIL", "PASS"]
    assert round_.canaries().keys() == {second.snapshot_id}
    assert round_.promote_best(actor="tester").snapshot_id == live(store) == second.snapshot_id


def test_a_damaged_candidate_does_not_end_the_round(gated):
    """When the files of the best are damaged, the next best is judged and promoted; alone, the damage is said."""
    store, strong, weak, _ = gated
    lenient = GATE.model_copy(update={"mrr_floor": 0.0, "ann_recall_floor": 0.0, "margin": 0.9})
    second = replace(weak, bm25=dict.fromkeys(weak.bm25, 0.0))
    (store.root / "snapshots" / strong.snapshot_id / "stray").write_text("x")
    with pytest.raises(SnapshotError, match="stray"):
        open_round(store, strong, gate=lenient).promote_best(actor="tester")
    assert open_round(store, strong, second, gate=lenient).promote_best(actor="tester").snapshot_id == live(store) == second.snapshot_id


def test_gates_held_one_by_one_pass_over_a_damaged_candidate(gated):
    """Warm-up and canary go on with the next when files of the best are damaged, and say what was; with nothing else, the damage is raised."""
    store, strong, weak, _ = gated
    lenient = GATE.model_copy(update={"mrr_floor": 0.0, "ann_recall_floor": 0.0, "margin": 0.9})
    second = replace(weak, bm25=dict.fromkeys(weak.bm25, 0.0))
    (store.root / "snapshots" / strong.snapshot_id / "stray").write_text("x")
    for held in ("warm_ups", "canaries"):
        round_ = open_round(store, strong, second, gate=lenient)
        assert {snapshot_id: each.outcome for snapshot_id, each in getattr(round_, held)().items()} == {second.snapshot_id: "PASS"}
        assert round_.damaged.keys() == {strong.snapshot_id}
        assert "stray" in round_.damaged[strong.snapshot_id]
        with pytest.raises(SnapshotError, match="stray"):
            getattr(open_round(store, strong, gate=lenient), held)()


def test_the_canary_compares_with_what_is_live(gated):
    """The verdict names the champion and is as old as the older evaluation; a loss beyond the margin and thin traffic do not pass."""
    store, strong, weak, larger = gated
    verdict = judge_canary(store, weak, strong, gate=GATE)
    assert (verdict.outcome, verdict.champion, verdict.gate) == ("INCONCLUSIVE", strong.snapshot_id, CANARY)
    assert judge_canary(store, larger, strong, gate=GATE).outcome == "PASS"
    assert judge_canary(store, larger, strong, gate=Gate(min_queries=300)).outcome == "INCONCLUSIVE"
    assert judge_canary(store, larger, strong, gate=GATE).measured_at == min(larger.measured_at, strong.measured_at)


def test_a_stale_champion_is_measured_again(gated):
    """An evaluation of the champion that is older than the gate allows is no basis of comparison: it is asked for afresh."""
    store, strong, weak, _ = gated
    round_of(store, strong)
    asked = []

    def on_demand(snapshot_id):
        asked.append(snapshot_id)
        return strong

    round_of(store, replace(strong, measured_at="2026-01-01T00:00:00+00:00"), weak, measured=on_demand)
    assert set(asked) == {strong.snapshot_id}


def test_a_round_lets_the_gates_judge_an_override(gated):
    """A champion promoted by override is judged against the release before it: one that passes stands on verdicts then, a weaker one does not."""
    store, strong, weak, larger = gated
    round_of(store, strong)
    promote(store, larger.snapshot_id, gate=GATE, actor="tester", reason="incident", override=True)
    assert override_of(store, Ledger(store).state().champion)
    assert round_of(store, larger, measured=lambda _: strong) is None
    assert override_of(store, Ledger(store).state().champion) is None
    assert [read_verdict(store, larger.snapshot_id, gate).outcome for gate in GATES] == ["PASS"] * 3
    promote(store, weak.snapshot_id, gate=GATE, actor="tester", reason="incident", override=True)
    assert round_of(store, weak, measured=lambda _: larger) is None
    assert override_of(store, Ledger(store).state().champion)


def test_a_promotion_by_name_gets_its_later_verdicts(gated):
    """A snapshot that passed retrieval quality against the champion is warmed up and replayed on request; one that failed is not."""
    store, strong, weak, larger = gated
    round_of(store, strong)
    judge(store, larger, strong, gate=GATE)
    judge(store, weak, strong, gate=GATE)
    round_ = open_round(store, strong)
    round_.complete(larger)
    round_.complete(weak)
    assert read_verdict(store, weak.snapshot_id, WARM_UP) is None
    assert promote(store, larger.snapshot_id, gate=GATE, actor="tester", reason="by name")
