"""Promotion, rollback and holds: what is refused, and what is written."""

import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from small_line import GATE, build, days_ago, pass_and_promote, pass_gates, passages, verdict_of

from rag_serving.errors import NoPrevious, PromotionRefused, ReleaseConflict, ReleaseError, SnapshotError
from rag_serving.promotion import abort, hold, lift, override_of, pin, promote, rollback, start_canary, unpin
from rag_serving.refusals import last_refusal
from rag_serving.releases import Action, Ledger
from rag_serving.retrieval import Retriever
from rag_serving.settings import Canary
from rag_serving.snapshots import snapshot_key
from rag_serving.verdicts import CANARY, GATES, RETRIEVAL_QUALITY, WARM_UP, write_verdict


def live(store) -> str | None:
    champion = Ledger(store).state().champion
    return champion.snapshot_id if champion else None


def attempt(store, manifest, **changes):
    return promote(store, manifest.snapshot_id, **{"gate": GATE, "actor": "tester", "reason": "better", **changes})


def refused(store, manifest, match, error=PromotionRefused, **changes):
    """The promotion is refused with this text, and the ledger is as it was."""
    before = Ledger(store).entries()
    with pytest.raises(error, match=match):
        attempt(store, manifest, **changes)
    assert Ledger(store).entries() == before
    if error is PromotionRefused:
        assert (last_refusal(store).snapshot_id, last_refusal(store).actor) == (manifest.snapshot_id, changes.get("actor", "tester"))


def test_a_refusal_is_remembered_and_reported_where_it_cannot_be(line, caplog):
    """The store keeps the code of the last refusal; where it takes nothing, the caller still gets the refusal and the log says the rest."""
    store, (first, second, *_) = line
    assert last_refusal(store) is None
    refused(store, first, "has no retrieval quality verdict")
    assert last_refusal(store).code == "verdict_absent"
    assert pass_and_promote(store, first).number > last_refusal(store).after == 0
    for spoiled in (b"{", b"[]", b'{"at": "yesterday", "after": 0}', b'{"at": "2026-01-01"}'):
        store.write("promotion_refused.json", spoiled)
        assert last_refusal(store) is None, spoiled
    (store.root / "promotion_refused.json").unlink()
    (store.root / "promotion_refused.json").mkdir()
    with pytest.raises(PromotionRefused, match="has no retrieval quality verdict"):
        attempt(store, second)
    assert "was not written down" in caplog.text


def test_promotion_records_its_evidence(line):
    """A promotion with a fresh PASS makes the snapshot live, and the entry holds manifest hash, verdict, actor and reason."""
    store, (first, *_) = line
    entry = pass_and_promote(store, first, reason="MRR 0.9")
    assert entry == Ledger(store).entries()[0]
    assert (entry.action, entry.actor, entry.reason, entry.manifest_sha256) == (Action.PROMOTE, "tester", "MRR 0.9", first.sha256)
    assert entry.evidence["verdict"]["summary"] == "PASS: 0.900"
    assert (entry.evidence["override"], entry.evidence["allow_shrink"]) == (False, False)
    assert [entry.evidence[gate]["gate"] for gate in (WARM_UP, CANARY)] == [WARM_UP, CANARY]
    assert live(store) == first.snapshot_id


def test_promoting_the_champion_changes_nothing(line):
    """A promotion of what is live is a no-op, also without any verdict and during a hold."""
    store, (first, *_) = line
    pass_and_promote(store, first)
    write_verdict(store, verdict_of(store, first, outcome="FAIL"))
    hold(store, actor="tester", reason="drift")
    assert attempt(store, first) is None
    assert Ledger(store).last_number() == 2


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"outcome": "FAIL", "summary": "FAIL: 0.512 is below the floor"}, "0.512 is below the floor"),
        ({"outcome": "INCONCLUSIVE", "summary": "INCONCLUSIVE: 12 queries"}, "12 queries"),
        ({"manifest_sha256": "f" * 64}, "belongs to another snapshot"),
        ({"measured_at": days_ago(8)}, "8.0 days old; 7 are allowed"),
        ({"measured_at": days_ago(-1)}, "-1.0 days old"),
        ({"champion": "another-0123456789ab"}, "with another-0123456789ab, but None is live"),
    ],
)
def test_weak_evidence_is_refused(line, changes, match):
    """A verdict that is not PASS, of another manifest, too old, from the future or against another champion promotes nothing (I7)."""
    store, (first, *_) = line
    write_verdict(store, verdict_of(store, first, **changes))
    refused(store, first, match)


def test_absent_copied_or_edited_verdict_is_refused(line):
    """No verdict, another snapshot's verdict under this one's name, and one edited from FAIL to PASS are refused."""
    store, (first, second, *_) = line
    refused(store, first, "has no retrieval quality verdict")
    write_verdict(store, verdict_of(store, second))
    key = f"verdicts/{{}}/{RETRIEVAL_QUALITY}.json"
    store.write(key.format(first.snapshot_id), store.read(key.format(second.snapshot_id)))
    refused(store, first, "belongs to another snapshot")
    write_verdict(store, verdict_of(store, first, outcome="FAIL"))
    fields = json.loads(store.read(key.format(first.snapshot_id)))
    store.write(key.format(first.snapshot_id), json.dumps({**fields, "outcome": "PASS"}).encode())
    refused(store, first, "was edited")


def test_freshness_limit_is_the_gates(line):
    """A verdict is good for `max_age_days` and not longer."""
    store, (first, *_) = line
    measured = datetime.now(UTC) - timedelta(days=3)
    pass_gates(store, first, measured_at=measured.isoformat())
    refused(store, first, "days old; 2 are allowed", gate=GATE.model_copy(update={"max_age_days": 2.0}))
    refused(store, first, "7.0 days old", now=measured + timedelta(days=7, seconds=1))
    assert attempt(store, first, now=measured + timedelta(days=7))


def test_champion_changed_since_the_verdict(line):
    """A PASS against nothing does not count once something is live: two approved challengers cannot both go live in turn."""
    store, (first, second, *_) = line
    pass_gates(store, second)
    pass_and_promote(store, first)
    refused(store, second, f"compared {second.snapshot_id} with None, but {first.snapshot_id} is live now")
    assert live(store) == first.snapshot_id


def test_hold_blocks_every_promotion_until_lifted(line):
    """A hold refuses promotions, overrides too, and names who placed it; several are lifted at once; a rollback is free to go."""
    store, (first, second, short, _) = line
    pass_and_promote(store, first)
    pass_and_promote(store, second)
    hold(store, actor="ana", reason="drift")
    hold(store, actor="bo", reason="more drift")
    pass_gates(store, short)
    refused(store, short, "entry 4 by bo, 'more drift'")
    refused(store, short, "a hold blocks every promotion", override=True)
    rollback(store, actor="tester", reason="bad answers")
    lift(store, actor="ana", reason="looked at it")
    assert Ledger(store).state().holds == ()
    assert pass_and_promote(store, second)


def test_hold_and_lift_need_a_reason(store):
    """A hold or lift without a reason is refused, and so is a lift when nothing is held."""
    with pytest.raises(ReleaseError, match="no hold to lift"):
        lift(store, actor="tester", reason="because")
    for reason in ("", "  "):
        with pytest.raises(ReleaseError, match="a hold needs a reason"):
            hold(store, actor="tester", reason=reason)
    hold(store, actor="tester", reason="drift")
    with pytest.raises(ReleaseError, match="a lift needs a reason"):
        lift(store, actor="tester", reason="")
    assert Ledger(store).last_number() == 1


def flip(folder):
    largest = max((path for path in folder.rglob("data/*.lance")), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)


def swap_for_link(folder):
    path = min(folder.rglob("data/*.lance"))
    path.rename(folder.parent.parent / "moved")
    path.symlink_to(folder.parent.parent / "moved")


DAMAGE = {
    "was altered": flip,
    "is missing": lambda folder: min(folder.rglob("data/*.lance")).unlink(),
    "does not belong there": lambda folder: (folder / "chunks.lance" / "extra").touch(),
    "is a link or no regular file": swap_for_link,
    "manifest of .* was altered": lambda folder: (folder / "MANIFEST.json").write_bytes((folder / "MANIFEST.json").read_bytes() + b"\n"),
}


@pytest.mark.parametrize(("match", "damage"), DAMAGE.items())
def test_damaged_snapshot_is_never_promoted(line, match, damage):
    """One flipped bit, a missing or extra file, a link or an edited manifest: refused with the name, by override too."""
    store, (first, *_) = line
    pass_gates(store, first)
    damage(store.folder(snapshot_key(first.snapshot_id)))
    refused(store, first, match, SnapshotError)
    refused(store, first, match, SnapshotError, override=True)


def test_absent_snapshot(line):
    """Promoting what is not there, or what is no id at all, is a SnapshotError."""
    store, _ = line
    for snapshot_id in ("nothing-0123456789ab", "../../etc", ""):
        with pytest.raises(SnapshotError):
            promote(store, snapshot_id, gate=GATE, actor="tester", reason="")


def test_shrunk_corpus_needs_the_flag(line):
    """A snapshot with 25 % fewer rows is refused, by override too; the flag allows it and the entry says so."""
    store, (first, _, short, _) = line
    pass_and_promote(store, first)
    pass_gates(store, short)
    refused(store, short, "has 30 rows, the champion 40: more than 20% fewer")
    refused(store, short, "more than 20% fewer", override=True)
    assert attempt(store, short, allow_shrink=True).evidence["allow_shrink"] is True
    assert live(store) == short.snapshot_id


def test_override_needs_reason_and_actor_and_is_recorded(line):
    """An override promotes without PASS, needs a reason and an actor, and keeps the verdict it overrode, if one can be read."""
    store, (first, second, *_) = line
    write_verdict(store, verdict_of(store, first, outcome="FAIL", summary="FAIL: weak"))
    refused(store, first, "needs a reason and an actor", override=True, reason=" ")
    refused(store, first, "needs a reason and an actor", override=True, actor="")
    entry = attempt(store, first, override=True, reason="incident 7")
    assert (entry.reason, entry.evidence["override"], entry.evidence["verdict"]["summary"]) == ("incident 7", True, "FAIL: weak")
    store.write(f"verdicts/{second.snapshot_id}/{RETRIEVAL_QUALITY}.json", b"broken")
    assert attempt(store, second, override=True, reason="incident 8").evidence["verdict"] is None


def test_concurrent_promotion_loses(line, monkeypatch):
    """When another writer appends while a promotion verifies its snapshot, the promotion is refused and the other entry stands."""
    store, (first, *_) = line
    pass_gates(store, first)
    from rag_serving import promotion

    def verify_slowly(*arguments):
        hold(store, actor="other", reason="meanwhile")
        return original(*arguments)

    original = promotion.verify
    monkeypatch.setattr(promotion, "verify", verify_slowly)
    with pytest.raises(ReleaseConflict):
        attempt(store, first)
    assert [entry.action for entry in Ledger(store).entries()] == [Action.HOLD]


def test_rollback_goes_back_step_by_step(line):
    """A rollback makes the previous release live; a second one goes further back; at the start there is nowhere to go."""
    store, (first, second, _, indexed) = line
    with pytest.raises(NoPrevious):
        rollback(store, actor="tester", reason="bad")
    for manifest in (first, second, indexed):
        pass_and_promote(store, manifest)
    started = time.perf_counter()
    entry = rollback(store, actor="tester", reason="bad")
    seconds = time.perf_counter() - started
    print(f"rollback of a 40-row snapshot: {seconds:.3f} s")
    assert seconds < 5
    assert (entry.number, entry.evidence["from"], live(store)) == (4, indexed.snapshot_id, second.snapshot_id)
    rollback(store, actor="tester", reason="bad")
    assert live(store) == first.snapshot_id
    with pytest.raises(NoPrevious):
        rollback(store, actor="tester", reason="bad")
    assert live(store) == first.snapshot_id


def test_a_rollback_that_waited_undoes_nothing_newer(line):
    """Asked for while one snapshot was live, a rollback is a conflict once another is; the newer release stays."""
    store, (first, second, _, indexed) = line
    for manifest in (first, second, indexed):
        pass_and_promote(store, manifest)
    with pytest.raises(ReleaseConflict, match="no longer live"):
        rollback(store, actor="tester", reason="bad", to=first.snapshot_id, champion=second.snapshot_id)
    assert live(store) == indexed.snapshot_id
    rollback(store, actor="tester", reason="bad", champion=indexed.snapshot_id)
    assert live(store) == second.snapshot_id


def test_rollback_to_a_named_release(line):
    """`to` jumps to any earlier release; one that was never live, or is live now, is refused with the choices."""
    store, (first, second, short, indexed) = line
    for manifest in (first, second, indexed):
        pass_and_promote(store, manifest)
    for target in (short.snapshot_id, indexed.snapshot_id, "../x"):
        with pytest.raises(NoPrevious, match="is not an earlier release"):
            rollback(store, actor="tester", reason="bad", to=target)
    rollback(store, actor="tester", reason="bad", to=first.snapshot_id)
    assert live(store) == first.snapshot_id
    assert Ledger(store).state().previous is None


def test_rollback_verifies_its_target(line):
    """A rollback to a damaged snapshot is refused and the champion stays."""
    store, (first, second, *_) = line
    pass_and_promote(store, first)
    pass_and_promote(store, second)
    flip(store.folder(snapshot_key(first.snapshot_id)))
    with pytest.raises(SnapshotError, match="was altered"):
        rollback(store, actor="tester", reason="bad")
    assert live(store) == second.snapshot_id


def test_promotion_again_after_rollback(line):
    """A rolled-back snapshot may come back with a new verdict, and then rolls back to the same place; numbers only grow (I2)."""
    store, (first, second, *_) = line
    pass_and_promote(store, first)
    pass_and_promote(store, second)
    rollback(store, actor="tester", reason="bad")
    pass_and_promote(store, second)
    assert live(store) == second.snapshot_id
    rollback(store, actor="tester", reason="bad again")
    assert live(store) == first.snapshot_id
    assert [entry.number for entry in Ledger(store).entries()] == [1, 2, 3, 4, 5]


async def _top(store, snapshot_id: str):
    from small_line import MODEL

    retriever = await Retriever.open(store, snapshot_id)
    try:
        vectors = MODEL.encode_queries(passages(20))
        return [await retriever.retrieve(text, vector, k=10) for text, vector in zip(passages(20), vectors, strict=True)]
    finally:
        retriever.close()


def test_rollback_restores_the_answers(line):
    """After promote and rollback the probe queries get the identical hits and scores (I6)."""
    import asyncio

    store, (first, second, *_) = line
    pass_and_promote(store, first)
    before = asyncio.run(_top(store, live(store)))
    pass_and_promote(store, second)
    assert asyncio.run(_top(store, live(store))) != before
    rollback(store, actor="tester", reason="bad")
    assert asyncio.run(_top(store, live(store))) == before


def test_failed_build_leaves_the_release(line):
    """A build that is refused leaves ledger, snapshots and every byte of the champion as they were (I10)."""
    store, (first, *_) = line
    pass_and_promote(store, first)
    before = sorted(path for path in store.root.rglob("*"))
    with pytest.raises(SnapshotError):
        build(store, [])
    assert sorted(path for path in store.root.rglob("*")) == before
    assert live(store) == first.snapshot_id


def _edit(store, manifest, gate=RETRIEVAL_QUALITY):
    key = f"verdicts/{manifest.snapshot_id}/{gate}.json"
    fields = json.loads(store.read(key))
    store.write(key, json.dumps({**fields, "measured_at": days_ago(-0.001)}).encode())


def _promote_meanwhile(store, monkeypatch, other):
    from rag_serving import promotion

    pass_gates(store, other)
    original = promotion.verify

    def verify_slowly(*arguments):
        monkeypatch.setattr(promotion, "verify", original)
        promote(store, other.snapshot_id, gate=GATE, actor="other", reason="faster")
        return original(*arguments)

    monkeypatch.setattr(promotion, "verify", verify_slowly)


BAD_ATTEMPTS = {
    "stale verdict": ("verdict_stale", "8.0 days old"),
    "edited verdict": ("verdict_edited", "was edited"),
    "verdict of another snapshot": ("verdict_foreign", "belongs to another snapshot"),
    "failed verdict": ("verdict_failed", "FAIL: 0.512"),
    "verdict against another champion": ("verdict_outdated", "is live now"),
    "flipped bit": ("snapshot", "was altered"),
    "half the rows": ("corpus_shrunk", "more than 20% fewer"),
    "active hold": ("held", "a hold blocks every promotion"),
    "concurrent promoter": ("release_conflict", "at entry 2, not 1"),
}


@pytest.mark.parametrize("attempted", BAD_ATTEMPTS)
def test_every_bad_attempt_is_refused_for_its_own_reason(line, monkeypatch, attempted):
    """Stale, edited, foreign, failed or outdated evidence, a flipped bit, lost rows, a hold, another promoter: 0 accepted, each with its code."""
    store, (first, second, short, indexed) = line
    code, reason = BAD_ATTEMPTS[attempted]
    pass_and_promote(store, indexed if attempted == "half the rows" else second)
    challenger = short if attempted == "half the rows" else first
    pass_gates(store, challenger, **({"measured_at": days_ago(8)} if attempted == "stale verdict" else {}))
    match attempted:
        case "edited verdict":
            _edit(store, challenger)
        case "verdict of another snapshot":
            write_verdict(store, verdict_of(store, challenger, manifest_sha256=second.sha256))
        case "failed verdict":
            write_verdict(store, verdict_of(store, challenger, outcome="FAIL", summary="FAIL: 0.512"))
        case "verdict against another champion":
            pass_and_promote(store, indexed)
        case "flipped bit":
            flip(store.folder(snapshot_key(challenger.snapshot_id)))
        case "active hold":
            hold(store, actor="ana", reason="drift")
        case "concurrent promoter":
            _promote_meanwhile(store, monkeypatch, indexed)
    before = live(store)
    with pytest.raises((PromotionRefused, SnapshotError, ReleaseConflict), match=reason) as refusal:
        attempt(store, challenger)
    assert refusal.value.code == code
    assert live(store) == (indexed.snapshot_id if attempted == "concurrent promoter" else before)
    assert challenger.snapshot_id not in {entry.snapshot_id for entry in Ledger(store).entries()}


def test_the_reasons_differ():
    """No two bad attempts share a code."""
    codes = [code for code, _ in BAD_ATTEMPTS.values()]
    assert len(set(codes)) == len(codes)


PROMOTE = """
import sys, time
from pathlib import Path
from small_line import GATE
from rag_serving.errors import RaglineError
from rag_serving.promotion import promote
from rag_serving.store import LocalStore
store, snapshot_id, ready = LocalStore(Path(sys.argv[1])), sys.argv[2], Path(sys.argv[3])
ready.touch()
while not (ready.parent / "go").exists():
    time.sleep(0.0005)
try:
    promote(store, snapshot_id, gate=GATE, actor=snapshot_id, reason="race")
    print("live")
except RaglineError as error:
    print(error.code)
"""


def test_of_two_promoting_processes_one_wins(line, tmp_path):
    """Two processes promote two approved snapshots at the same moment: one is live, the other is told that it came too late."""
    store, (first, second, *_) = line
    for manifest in (first, second):
        pass_gates(store, manifest)
    children = [
        subprocess.Popen(
            [sys.executable, "-c", PROMOTE, str(store.root), manifest.snapshot_id, str(tmp_path / f"ready-{number}")],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        )
        for number, manifest in enumerate((first, second))
    ]
    while len(list(tmp_path.glob("ready-*"))) < 2:
        assert all(child.poll() is None for child in children)
        time.sleep(0.01)
    (tmp_path / "go").touch()
    said = sorted(child.communicate()[0].strip() for child in children)
    assert said in (["live", "release_conflict"], ["live", "verdict_outdated"])
    (entry,) = Ledger(store).entries()
    assert live(store) == entry.snapshot_id == entry.actor


@pytest.mark.parametrize("gate", GATES)
def test_every_gate_is_required(line, gate):
    """A missing, failed, stale or edited verdict of any one gate refuses a promotion and names the gate or what it said."""
    store, (first, *_) = line
    for changes, code in (
        ({"outcome": "FAIL", "summary": f"FAIL: {gate}"}, "verdict_failed"),
        ({"outcome": "INCONCLUSIVE", "summary": f"INCONCLUSIVE: {gate}"}, "verdict_failed"),
        ({"measured_at": days_ago(8)}, "verdict_stale"),
        ({"eval_set_sha256": "d" * 64}, "verdict_foreign"),
    ):
        pass_gates(store, first)
        write_verdict(store, verdict_of(store, first, gate=gate, champion=None, **changes))
        with pytest.raises(PromotionRefused) as refusal:
            attempt(store, first)
        assert refusal.value.code == code
    pass_gates(store, first)
    _edit(store, first, gate)
    refused(store, first, f"the {gate} verdict .* was edited")
    (store.root / "verdicts" / first.snapshot_id / f"{gate}.json").unlink()
    refused(store, first, f"has no {gate.replace('_', ' ')} verdict")
    pass_gates(store, first)
    assert attempt(store, first)


def test_a_verdict_under_another_gates_name_is_foreign(line):
    """The quality verdict of the very same snapshot does not pass for its warm-up verdict."""
    store, (first, *_) = line
    pass_gates(store, first)
    key = f"verdicts/{first.snapshot_id}/{{}}.json"
    store.write(key.format(WARM_UP), store.read(key.format(RETRIEVAL_QUALITY)))
    refused(store, first, "belongs to another snapshot or gate")


def test_an_override_expires_unless_the_gates_pass(line):
    """The entry says until when; after that the release stands on an expired override, until it passes every gate; verdicts alone are no override."""
    store, (first, second, *_) = line
    now = datetime.now(UTC)
    entry = attempt(store, first, override=True, reason="incident 7", now=now)
    assert entry.evidence["override_expires_at"] == (now + timedelta(hours=24)).isoformat(timespec="seconds")
    champion = Ledger(store).state().champion
    assert override_of(store, champion, now=now + timedelta(hours=23)).expired is False
    late = override_of(store, champion, now=now + timedelta(hours=25))
    assert (late.number, late.expired) == (1, True)
    pass_gates(store, first, champion=None)
    assert override_of(store, champion, now=now + timedelta(hours=25)) is None
    pass_and_promote(store, second)
    assert override_of(store, Ledger(store).state().champion) is None


def test_an_override_is_not_ended_by_what_it_overrode(line):
    """PASS verdicts against an earlier champion, which the override was needed for, are no reason to call it passed; those against its own are."""
    store, (first, second, _, indexed) = line
    pass_and_promote(store, first)
    pass_gates(store, indexed)
    pass_and_promote(store, second)
    refused(store, indexed, "is live now")
    attempt(store, indexed, override=True, reason="incident 7")
    standing = override_of(store, Ledger(store).state().champion, now=datetime.now(UTC) + timedelta(hours=25))
    assert standing.expired
    pass_gates(store, indexed, champion=second.snapshot_id)
    assert override_of(store, Ledger(store).state().champion) is None


@pytest.mark.parametrize(
    ("gate", "rule", "change"),
    [
        (RETRIEVAL_QUALITY, ("mrr_floor", 0.8), {"mrr_floor": 0.85}),
        (RETRIEVAL_QUALITY, ("non_inferiority", -0.02), {"margin": 0.01}),
        (CANARY, ("enough_traffic", 300.0), {"min_queries": 1000}),
        (WARM_UP, ("vector_search_p95", 10.0), {"warm_up_p95_ms": 5.0}),
    ],
)
def test_a_verdict_on_easier_terms_is_outdated(line, gate, rule, change):
    """A PASS from before the gate was made stricter promotes nothing; one on stricter terms than today's does."""
    store, (first, *_) = line
    pass_gates(store, first)
    name, required = rule
    rules = ({"name": name, "passed": True, "observed": required, "required": required},)
    write_verdict(store, verdict_of(store, first, gate=gate, rules=rules))
    with pytest.raises(PromotionRefused, match=f"was given with {name} at {required:g}; the gate asks for") as refusal:
        attempt(store, first, gate=GATE.model_copy(update=change))
    assert refusal.value.code == "verdict_outdated"
    assert attempt(store, first)


@pytest.mark.parametrize(
    ("rule", "today"),
    [
        (("real_grounded", -0.02), {"traffic": Canary(margin=0.01)}),
        (("no_harm", 20.0), {"gate": GATE.model_copy(update={"alpha": 0.1})}),
        (("no_harm", 20.0), {"gate": GATE.model_copy(update={"alpha": 0.01})}),
    ],
)
def test_a_canary_verdict_on_other_terms_is_outdated(line, rule, today):
    """A smaller `canary.margin` than real traffic was judged by, or another error rate than the evidence was weighed at, asks for a new verdict.

    A larger alpha shows harm sooner, a smaller one asks more of non-inferiority: neither is what was passed. A larger margin is.
    """
    store, (first, *_) = line
    pass_gates(store, first)
    name, required = rule
    rules = ({"name": name, "passed": True, "observed": 0.0, "required": required},)
    write_verdict(store, verdict_of(store, first, gate=CANARY, rules=rules))
    with pytest.raises(PromotionRefused, match=f"was given with {name} at {required:g}; the gate asks for") as refusal:
        attempt(store, first, **today)
    assert refusal.value.code == "verdict_outdated"
    assert attempt(store, first, traffic=Canary(margin=0.05))


def test_an_expired_override_is_not_followed_by_another(line):
    """While the live release stands on an expired override, a new override is refused; a PASS or a rollback is the way out."""
    store, (first, second, short, _) = line
    pass_and_promote(store, first)
    attempt(store, second, override=True, reason="incident 7", now=datetime.now(UTC) - timedelta(hours=25))
    with pytest.raises(PromotionRefused, match="stands on an override that expired") as refusal:
        attempt(store, short, override=True, allow_shrink=True, reason="incident 8")
    assert refusal.value.code == "override_expired"
    pass_gates(store, short)
    assert attempt(store, short, allow_shrink=True)
    rollback(store, actor="tester", reason="back to the override")
    assert override_of(store, Ledger(store).state().champion).expired
    rollback(store, actor="tester", reason="back to what passed")
    assert attempt(store, second, override=True, reason="incident 9")


def test_a_canary_is_started_ended_and_promoted(line):
    """A canary needs a reason and PASS of quality and warm-up; the champion stays live; an abort ends it alone; a promotion makes it live."""
    store, (first, second, *_) = line
    pass_and_promote(store, first)
    with pytest.raises(PromotionRefused, match="has no retrieval quality verdict"):
        start_canary(store, second.snapshot_id, gate=GATE, actor="tester", reason="try it")
    for gate in (RETRIEVAL_QUALITY, WARM_UP):
        write_verdict(store, verdict_of(store, second, gate=gate))
    for reason in ("", " \n"):
        with pytest.raises(ReleaseError, match="a canary needs a reason"):
            start_canary(store, second.snapshot_id, gate=GATE, actor="tester", reason=reason)
    entry = start_canary(store, second.snapshot_id, gate=GATE, actor="tester", reason="try it")
    assert (entry.action, entry.evidence["champion"]) == (Action.CANARY, first.snapshot_id)
    assert (live(store), Ledger(store).state().canary.snapshot_id) == (first.snapshot_id, second.snapshot_id)
    with pytest.raises(ReleaseError, match="is the canary already"):
        start_canary(store, second.snapshot_id, gate=GATE, actor="tester", reason="again")
    refused(store, second, "has no canary verdict")
    ended = abort(store, actor="tester", reason="more abstentions", evidence={"abstentions": 0.2})
    assert ended.evidence == {"canary": second.snapshot_id, "abstentions": 0.2}
    assert (live(store), Ledger(store).state().canary) == (first.snapshot_id, None)
    start_canary(store, second.snapshot_id, gate=GATE, actor="tester", reason="try again")
    write_verdict(store, verdict_of(store, second, gate=CANARY))
    assert attempt(store, second).snapshot_id == live(store) == second.snapshot_id
    assert Ledger(store).state().canary is None


def test_what_cannot_be_a_canary(line):
    """Nothing live, the champion itself, a hold, a damaged or a shrunk snapshot: no canary; and without one there is nothing to abort."""
    store, (first, second, short, _) = line

    def canary(manifest):
        return start_canary(store, manifest.snapshot_id, gate=GATE, actor="tester", reason="try it")

    pass_gates(store, second)
    with pytest.raises(ReleaseError, match="nothing is live to compare with"):
        canary(second)
    pass_and_promote(store, first)
    with pytest.raises(ReleaseError, match="it is live"):
        canary(first)
    with pytest.raises(ReleaseError, match="no canary to abort"):
        abort(store, actor="tester", reason="why not")
    pass_gates(store, short)
    with pytest.raises(PromotionRefused, match="more than 20% fewer"):
        canary(short)
    pass_gates(store, second)
    hold(store, actor="ana", reason="drift")
    with pytest.raises(PromotionRefused, match="a hold blocks"):
        canary(second)
    lift(store, actor="ana", reason="looked at it")
    flip(store.folder(snapshot_key(second.snapshot_id)))
    with pytest.raises(SnapshotError, match="was altered"):
        canary(second)
    assert Ledger(store).state().canary is None


def test_a_collected_snapshot_is_never_used_again(line):
    """What `gc` gave up is refused, by override too, even while its bytes are there, and cannot be pinned any more."""
    store, (first, *_) = line
    pass_gates(store, first)
    Ledger(store).append(Action.COLLECT, after=0, actor="gc", reason="old", evidence={"snapshots": [first.snapshot_id]})
    for override in (False, True):
        with pytest.raises(PromotionRefused, match="was given up") as refusal:
            attempt(store, first, override=override)
        assert refusal.value.code == "collected"
    with pytest.raises(ReleaseError, match="was collected"):
        pin(store, first.snapshot_id, actor="tester", reason="needed again")
    assert Ledger(store).last_number() == 1


def test_pins(line):
    """A pinned snapshot may not be collected until it is unpinned; both need a reason, and an unpin needs a pin."""
    store, (first, *_) = line
    with pytest.raises(ReleaseError, match="a pin needs a reason"):
        pin(store, first.snapshot_id, actor="tester", reason=" ")
    pin(store, first.snapshot_id, actor="tester", reason="audit")
    assert Ledger(store).state().kept == {first.snapshot_id}
    with pytest.raises(ReleaseError, match="live, previous, canary or pinned"):
        Ledger(store).append(Action.COLLECT, after=1, actor="gc", reason="old", evidence={"snapshots": [first.snapshot_id]})
    unpin(store, first.snapshot_id, actor="tester", reason="audit over")
    assert Ledger(store).state().kept == frozenset()
    with pytest.raises(SnapshotError, match="is not pinned"):
        unpin(store, first.snapshot_id, actor="tester", reason="twice")


def test_a_hold_keeps_what_was_found(line):
    """The findings of a detector stand in the hold's entry, and the lift names the holds that it ended."""
    store, _ = line
    found = {"findings": [{"kind": "mrr_fall", "detail": "MRR fell by 0.051", "numbers": {"mrr": 0.849}}]}
    assert hold(store, actor="sensor", reason="MRR fell by 0.051", evidence=found).evidence == found
    hold(store, actor="ana", reason="freeze")
    assert lift(store, actor="ana", reason="fixed").evidence == {"lifted": [1, 2]}
