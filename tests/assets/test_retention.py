"""Retention: what stays whatever happens, what goes, and that an interrupted collection is finished by the next."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from small_line import GATE

from rag_assets.retention import collect, plan
from rag_serving import promotion
from rag_serving.errors import NoPrevious, ReleaseConflict, ReleaseError, StoreError
from rag_serving.releases import Action, Ledger
from rag_serving.settings import Retention
from rag_serving.snapshots import Manifest, hash_tree, seal, snapshot_ids, snapshot_key, verify
from rag_serving.store import LocalStore

KEEP_ONE = Retention(keep=1)


def publish(store: LocalStore, number: int, *, model: str = "small", fingerprint: str = "f" * 64) -> str:
    """A sealed snapshot of one file; the numbers order them in time."""
    with store.staging("snapshots/build") as folder:
        (folder / "data").write_bytes(b"row %d" % number)
        manifest = Manifest(
            build_key=f"{number:064d}",
            embedding_model=model,
            fingerprint=fingerprint,
            dims=2,
            corpus_sha256="c" * 64,
            documents=1,
            rows=1,
            chunking={},
            index={},
            retrieval={},
            title_distinctness=1.0,
            parent=None,
            lancedb="0",
            built_at=f"2026-01-01T00:00:{number:02d}+00:00",
            files=hash_tree(folder),
        )
        seal(folder, manifest)
        store.publish(folder, snapshot_key(manifest.snapshot_id))
    return manifest.snapshot_id


def forced(store: LocalStore, snapshot_id: str) -> None:
    promotion.promote(store, snapshot_id, gate=GATE, actor="tester", reason="for a test", override=True)


def gone(decided, kind: str = "snapshots") -> set[str]:
    return {garbage.name for garbage in decided.of(kind)}


@pytest.fixture
def six(store) -> list[str]:
    """Six snapshots of one model: the first three were released in turn, the fourth is pinned."""
    made = [publish(store, number) for number in range(6)]
    for snapshot_id in made[:3]:
        forced(store, snapshot_id)
    promotion.pin(store, made[3], actor="tester", reason="audit")
    return made


def test_what_stays_and_why(store, six):
    """Live, previous, pinned, current and the newest stay, each with its reason; what was released longer ago goes."""
    store.write("corpus/snapshot-small.json", json.dumps({"snapshot_id": six[4]}).encode())
    decided = plan(store, KEEP_ONE)
    assert decided.kept == {
        six[2]: "live",
        six[1]: "previous",
        six[3]: "pinned",
        six[4]: "current",
        six[5]: "among the newest 1 of small",
    }
    assert gone(decided) == {six[0]}
    assert gone(plan(store, Retention(keep=6))) == set()


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"{}", b'{"snapshot_id": 7}', b"\xff\xfe"])
@pytest.mark.parametrize("key", ["corpus/snapshot-small.json", "embeddings/small.model.json"])
def test_a_damaged_pointer_collects_nothing(store, six, key, damage):
    """What tells which snapshots and vectors are in use cannot be read: an error of ours that names the file and what to do, and no plan."""
    store.write(key, damage)
    with pytest.raises(StoreError, match=rf"^{key} .* Delete that file; the next run makes it again\."):
        plan(store, KEEP_ONE)
    store.remove(key)
    assert gone(plan(store, KEEP_ONE)) == {six[0], six[4]}


def test_a_plan_touches_nothing(store, six):
    """A dry run leaves every byte as it was."""
    before = hash_tree(store.root)
    plan(store, KEEP_ONE)
    assert hash_tree(store.root) == before


def test_a_collection_is_recorded_and_final(store, six):
    """The ledger names what was given up, by whom; it cannot be promoted or pinned again; a second collection finds nothing."""
    entry = collect(store, plan(store, KEEP_ONE), actor="ana")
    assert (entry.action, entry.actor, entry.evidence["snapshots"]) == (Action.COLLECT, "ana", sorted([six[0], six[4]]))
    assert snapshot_ids(store) == sorted({*six} - {six[0], six[4]})
    again = plan(store, KEEP_ONE)
    assert again.garbage == ()
    assert collect(store, again, actor="ana") is None
    with pytest.raises(NoPrevious, match="is not an earlier release"):
        promotion.rollback(store, actor="tester", reason="far back", to=six[0])
    promotion.rollback(store, actor="tester", reason="one back")
    assert Ledger(store).state().previous is None


def test_a_canary_stays(store, six):
    """A snapshot that is tried as canary is kept, and no longer once it was ended."""
    ledger = Ledger(store)
    manifest = verify(store, six[4])
    ledger.append(Action.CANARY, after=4, actor="t", reason="try", snapshot_id=six[4], manifest_sha256=manifest.sha256)
    assert plan(store, KEEP_ONE).kept[six[4]] == "canary"
    promotion.abort(store, actor="t", reason="enough")
    assert six[4] in gone(plan(store, KEEP_ONE))


def test_a_ledger_that_went_on_stops_a_collection(store, six):
    """Between plan and collection somebody promotes what was to go: nothing is touched, and what is live now is there."""
    decided = plan(store, KEEP_ONE)
    forced(store, six[4])
    with pytest.raises(ReleaseConflict):
        collect(store, decided, actor="ana")
    assert snapshot_ids(store) == sorted(six)


def test_a_promotion_that_is_under_way_is_not_overtaken(store, six, monkeypatch):
    """A collection right after a promotion verified its snapshot: the promotion is refused, and the ledger names what is there."""
    original = promotion.verify

    def verify_slowly(*arguments):
        manifest = original(*arguments)
        monkeypatch.setattr(promotion, "verify", original)
        collect(store, plan(store, KEEP_ONE), actor="ana")
        return manifest

    monkeypatch.setattr(promotion, "verify", verify_slowly)
    with pytest.raises(ReleaseConflict):
        forced(store, six[4])
    assert verify(store, Ledger(store).state().champion.snapshot_id)


def test_a_damaged_ledger_stops_everything(store, six):
    """When the ledger cannot be trusted nothing is planned, so nothing is collected."""
    path = store.root / "releases" / "000002.json"
    path.write_bytes(path.read_bytes().replace(b"tester", b"nobody"))
    with pytest.raises(ReleaseError, match="000002"):
        plan(store, KEEP_ONE)


def test_an_unreadable_snapshot_is_left_to_a_person(store, six):
    """A snapshot whose manifest is damaged is neither counted nor collected, and the plan says so."""
    (store.folder(snapshot_key(six[0])) / "MANIFEST.json").write_bytes(b"{")
    decided = plan(store, KEEP_ONE)
    assert six[0] not in gone(decided)
    assert "cannot be read" in decided.kept[six[0]]


def test_evidence_of_releases_stays(store, six):
    """Evaluations and verdicts go with a snapshot that was never released, and stay for one that was."""
    manifests = {snapshot_id: verify(store, snapshot_id).sha256 for snapshot_id in six}
    for snapshot_id, sha256 in manifests.items():
        store.write(f"evaluations/{sha256[:32]}/{'e' * 32}/summary.json", b"{}")
        store.write(f"verdicts/{snapshot_id}/retrieval_quality.json", b"{}")
    collect(store, plan(store, KEEP_ONE), actor="ana")
    collect(store, plan(store, KEEP_ONE), actor="ana")
    never = six[4]
    assert set(store.names("verdicts")) == {*six} - {never}
    assert set(store.names("evaluations")) == {sha256[:32] for snapshot_id, sha256 in manifests.items() if snapshot_id != never}


def test_embeddings_go_when_nothing_used_them_for_long(store):
    """Vectors of a fingerprint that no snapshot has go after the configured days; those of a snapshot or of a configured model stay."""
    publish(store, 1, fingerprint="a" * 64)
    for letter in "abc":
        store.write(f"embeddings/{letter * 32}/segment", b"vectors")
    store.write("embeddings/small.model.json", json.dumps({"identity": "x", "fingerprint": "b" * 64}).encode())
    assert gone(plan(store, KEEP_ONE), "embeddings") == set()
    for path in (store.root / "embeddings").rglob("*"):
        os.utime(path, (time.time() - 40 * 86400,) * 2)
    decided = plan(store, KEEP_ONE)
    assert gone(decided, "embeddings") == {"c" * 32}
    collect(store, decided, actor="ana")
    assert [name for name in store.names("embeddings") if "." not in name] == ["a" * 32, "b" * 32]


def test_leftovers_of_interrupted_work_go_after_a_day(store, six):
    """An unfinished build is left alone while it may be under way, and freed when nobody touched it for a day."""
    folder = store.root / "snapshots" / ".staging-build-0123abcd"
    (folder / "chunks.lance").mkdir(parents=True)
    (folder / "chunks.lance" / "part").write_bytes(b"x" * 1000)
    assert gone(plan(store, Retention(keep=6)), "leftover") == set()
    for path in (folder, *folder.rglob("*")):
        os.utime(path, (time.time() - 2 * 86400,) * 2)
    (found,) = plan(store, Retention(keep=6)).of("leftover")
    assert found.bytes >= 1000
    collect(store, plan(store, Retention(keep=6)), actor="ana")
    assert not folder.exists()
    assert snapshot_ids(store) == sorted(six)


COLLECT = """
import sys
from pathlib import Path
from rag_assets.retention import collect, plan
from rag_serving.settings import Retention
from rag_serving.store import LocalStore
store = LocalStore(Path(sys.argv[1]))
decided = plan(store, Retention(keep=1))
print("planned", flush=True)
collect(store, decided, actor="child")
"""


@pytest.mark.parametrize("after_seconds", [0.0, 0.002, 0.005, 0.01, 0.02, 0.05])
def test_a_killed_collection_is_finished_by_the_next(store, six, after_seconds):
    """Kill -9 at some moment: what must stay is whole, no snapshot is half there, and the next collection takes the rest."""
    kept = set(plan(store, KEEP_ONE).kept)
    child = subprocess.Popen([sys.executable, "-c", COLLECT, str(store.root)], stdout=subprocess.PIPE)
    assert child.stdout
    assert child.stdout.readline() == b"planned\n"
    time.sleep(after_seconds)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    for snapshot_id in snapshot_ids(store):
        verify(store, snapshot_id)
    assert kept <= set(snapshot_ids(store))
    collect(store, plan(store, KEEP_ONE), actor="ana")
    assert set(snapshot_ids(store)) == kept


class Collecting(RuleBasedStateMachine):
    """I1 and I5: whatever is built, released, tried, pinned and collected, live, previous, canary and pinned snapshots are there, whole."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = TemporaryDirectory()
        self.store = LocalStore(Path(self.folder.name))
        self.built = 0
        self.build()

    def teardown(self) -> None:
        self.folder.cleanup()

    @rule()
    def build(self):
        publish(self.store, self.built, model=f"model-{self.built % 2}")
        self.built += 1

    @rule(data=st.data())
    def promote(self, data):
        forced(self.store, data.draw(st.sampled_from(snapshot_ids(self.store))))

    @precondition(lambda self: Ledger(self.store).state().previous)
    @rule()
    def rollback(self):
        promotion.rollback(self.store, actor="tester", reason="back")

    @rule(data=st.data())
    def try_canary(self, data):
        manifest = verify(self.store, data.draw(st.sampled_from(snapshot_ids(self.store))))
        ledger = Ledger(self.store)
        named = {"snapshot_id": manifest.snapshot_id, "manifest_sha256": manifest.sha256}
        ledger.append(Action.CANARY, after=ledger.last_number(), actor="tester", reason="try", **named)

    @precondition(lambda self: Ledger(self.store).state().canary)
    @rule()
    def abort(self):
        promotion.abort(self.store, actor="tester", reason="enough")

    @rule(data=st.data())
    def pin(self, data):
        promotion.pin(self.store, data.draw(st.sampled_from(snapshot_ids(self.store))), actor="tester", reason="audit")

    @precondition(lambda self: Ledger(self.store).state().pinned)
    @rule(data=st.data())
    def unpin(self, data):
        pinned = sorted(Ledger(self.store).state().pinned)
        promotion.unpin(self.store, data.draw(st.sampled_from(pinned)), actor="tester", reason="audit over")

    @rule(keep=st.integers(1, 2))
    def gc(self, keep):
        decided = plan(self.store, Retention(keep=keep))
        collect(self.store, decided, actor="tester")
        assert set(snapshot_ids(self.store)) == set(decided.kept)

    @rule()
    def gc_loses_its_race(self):
        decided = plan(self.store, KEEP_ONE)
        promotion.hold(self.store, actor="tester", reason="meanwhile")
        promotion.lift(self.store, actor="tester", reason="again")
        if decided.of("snapshots"):
            with pytest.raises(ReleaseConflict):
                collect(self.store, decided, actor="tester")

    @invariant()
    def what_must_stay_is_whole(self):
        state = Ledger(self.store).state()
        for snapshot_id in state.kept:
            verify(self.store, snapshot_id)
        assert not state.kept & state.collected


TestCollecting = Collecting.TestCase
TestCollecting.settings = settings(max_examples=8, stateful_step_count=15, deadline=None)
