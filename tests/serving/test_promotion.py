"""Promotion, rollback and holds: what is refused, and what is written."""

import json
import time
from datetime import UTC, datetime, timedelta

import pytest
from small_line import GATE, build, days_ago, pass_and_promote, passages, verdict_of

from rag_serving.errors import NoPrevious, PromotionRefused, ReleaseConflict, ReleaseError, SnapshotError
from rag_serving.promotion import hold, lift, promote, rollback
from rag_serving.releases import Action, Ledger
from rag_serving.retrieval import Retriever
from rag_serving.snapshots import snapshot_key
from rag_serving.verdicts import RETRIEVAL_QUALITY, write_verdict


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


def test_promotion_records_its_evidence(line):
    """A promotion with a fresh PASS makes the snapshot live, and the entry holds manifest hash, verdict, actor and reason."""
    store, (first, *_) = line
    entry = pass_and_promote(store, first, reason="MRR 0.9")
    assert entry == Ledger(store).entries()[0]
    assert (entry.action, entry.actor, entry.reason, entry.manifest_sha256) == (Action.PROMOTE, "tester", "MRR 0.9", first.sha256)
    assert entry.evidence["verdict"]["summary"] == "PASS: 0.900"
    assert (entry.evidence["override"], entry.evidence["allow_shrink"]) == (False, False)
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
        ({"champion": "another-0123456789ab"}, "compared with another-0123456789ab, but None is live"),
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
    write_verdict(store, verdict_of(store, first, measured_at=measured.isoformat()))
    refused(store, first, "days old; 2 are allowed", gate=GATE.model_copy(update={"max_age_days": 2.0}))
    refused(store, first, "7.0 days old", now=measured + timedelta(days=7, seconds=1))
    assert attempt(store, first, now=measured + timedelta(days=7))


def test_champion_changed_since_the_verdict(line):
    """A PASS against nothing does not count once something is live: two approved challengers cannot both go live in turn."""
    store, (first, second, *_) = line
    write_verdict(store, verdict_of(store, second))
    pass_and_promote(store, first)
    refused(store, second, f"compared with None, but {first.snapshot_id} is live now")
    assert live(store) == first.snapshot_id


def test_hold_blocks_every_promotion_until_lifted(line):
    """A hold refuses promotions, overrides too, and names who placed it; several are lifted at once; a rollback is free to go."""
    store, (first, second, short, _) = line
    pass_and_promote(store, first)
    pass_and_promote(store, second)
    hold(store, actor="ana", reason="drift")
    hold(store, actor="bo", reason="more drift")
    write_verdict(store, verdict_of(store, short))
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
    path = next(folder.rglob("data/*.lance"))
    path.rename(folder.parent.parent / "moved")
    path.symlink_to(folder.parent.parent / "moved")


DAMAGE = {
    "was altered": flip,
    "is missing": lambda folder: next(folder.rglob("data/*.lance")).unlink(),
    "does not belong there": lambda folder: (folder / "chunks.lance" / "extra").touch(),
    "is a link or no regular file": swap_for_link,
    "manifest of .* was altered": lambda folder: (folder / "MANIFEST.json").write_bytes((folder / "MANIFEST.json").read_bytes() + b"\n"),
}


@pytest.mark.parametrize(("match", "damage"), DAMAGE.items())
def test_damaged_snapshot_is_never_promoted(line, match, damage):
    """One flipped bit, a missing or extra file, a link or an edited manifest: refused with the name, by override too."""
    store, (first, *_) = line
    write_verdict(store, verdict_of(store, first))
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
    write_verdict(store, verdict_of(store, short))
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
    write_verdict(store, verdict_of(store, first))
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
