"""A release round on real evaluations: who is promoted, who is refused, and that a second round changes nothing."""

import asyncio
import json
import shutil
from dataclasses import replace

import pytest
from small_line import MODEL, build, passages

from evals.collections import EvalSet, Query
from evals.significance import EvidenceError
from rag_assets.evaluation import evaluate
from rag_assets.gating import judge, release, standings
from rag_serving.encoding import LocalEncoder
from rag_serving.errors import PromotionRefused
from rag_serving.promotion import hold, promote, rollback
from rag_serving.releases import Ledger
from rag_serving.settings import Gate, Retrieval, Weights
from rag_serving.snapshots import hash_tree
from rag_serving.store import LocalStore
from rag_serving.verdicts import RETRIEVAL_QUALITY, read_verdict, write_verdict

ROWS = 40
GATE = Gate(min_queries=30)
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


def round_of(store, *evaluations, champion_evaluation=unexpected, gate=GATE):
    return release(store, evaluations, gate=gate, actor="tester", champion_evaluation=champion_evaluation)


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

    assert round_of(store, weak, champion_evaluation=on_demand) is None
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
    """A champion measured on another eval set or at another k is not compared with."""
    store, strong, weak, _ = gated
    with pytest.raises(EvidenceError, match="another eval set or k"):
        judge(store, weak, replace(strong, **change), gate=GATE)
    assert read_verdict(store, weak.snapshot_id, RETRIEVAL_QUALITY) is None


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
