"""The ledger: who may append, what is refused, and the state that entries fold to."""

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from rag_serving.errors import ReleaseConflict, ReleaseError
from rag_serving.releases import Action, Ledger, State, current_actor
from rag_serving.store import LocalStore

APPEND = """
import sys, time
from pathlib import Path
from rag_serving.errors import ReleaseConflict
from rag_serving.releases import Action, Ledger
from rag_serving.store import LocalStore
root, me = Path(sys.argv[1]), sys.argv[2]
ledger, won = Ledger(LocalStore(root / "store")), []
(root / f"ready-{me}").touch()
while not (root / "go").exists():
    time.sleep(0.001)
for _ in range(40):
    after = ledger.last_number()
    try:
        won.append(ledger.append(Action.HOLD, after=after, actor=me, reason="race").number)
    except ReleaseConflict:
        pass
print(*won)
"""


@pytest.fixture
def ledger(store):
    return Ledger(store)


def append(ledger: Ledger, action: Action, snapshot: str | None = None, **changes):
    manifest = f"{snapshot:0>64}" if snapshot else None
    fields = {"after": ledger.last_number(), "actor": "tester", "reason": "why", "snapshot_id": snapshot, "manifest_sha256": manifest}
    return ledger.append(action, **{**fields, **changes})


@pytest.fixture
def five(ledger, store):
    """Five entries and the folder they are in."""
    for snapshot in "abcde":
        append(ledger, Action.PROMOTE, snapshot)
    return store.root / "releases"


def test_append_reads_back(ledger):
    """An appended entry is what a reader gets, chained to the one before, and numbers count from 1."""
    written = [append(ledger, Action.PROMOTE, "a", evidence={"mrr": 0.9}), append(ledger, Action.HOLD)]
    assert ledger.entries() == written
    assert [entry.number for entry in written] == [1, 2]
    assert written[1].parent_sha256 == written[0].sha256
    assert ledger.last_number() == 2
    assert ledger.state().champion.evidence == {"mrr": 0.9}


def test_empty_ledger(ledger):
    """Before the first release nothing is live and nothing is held."""
    assert ledger.state() == State()
    assert ledger.last_number() == 0


def test_append_after_a_stale_read_conflicts(ledger):
    """Who read number N and finds N + 1 taken is refused, and so is who claims a number that is not there yet."""
    append(ledger, Action.HOLD)
    for after in (0, 2):
        with pytest.raises(ReleaseConflict, match=f"at entry 1, not {after}"):
            append(ledger, Action.HOLD, after=after)
    assert ledger.last_number() == 1


def test_two_processes_never_share_an_entry(tmp_path):
    """Two processes appending at once: every number has one winner, the loser gets ReleaseConflict, and the chain verifies."""
    children = [subprocess.Popen([sys.executable, "-c", APPEND, str(tmp_path), name], stdout=subprocess.PIPE, text=True) for name in "xy"]
    while len(list(tmp_path.glob("ready-*"))) < 2:
        assert all(child.poll() is None for child in children)
    (tmp_path / "go").touch()
    outputs = [child.communicate()[0] for child in children]
    assert all(child.returncode == 0 for child in children)
    won = {name: [int(each) for each in output.split()] for name, output in zip("xy", outputs, strict=True)}
    entries = Ledger(LocalStore(tmp_path / "store")).entries()
    assert sorted(won["x"] + won["y"]) == [entry.number for entry in entries]
    assert all(entry.number in won[entry.actor] for entry in entries)
    assert len(entries) >= 40


@pytest.mark.parametrize("number", [1, 3, 5])
@pytest.mark.parametrize("change", [{"reason": "another"}, {"snapshot_id": "f"}, {"number": 9}, {"at": "2020-01-01T00:00:00+00:00"}])
def test_edits_are_refused(ledger, five, number, change):
    """Any edited entry, the newest one too, is refused by its name or the name of the one chained to it."""
    path = five / f"{number:06d}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}, sort_keys=True, indent=2))
    with pytest.raises(ReleaseError, match=f"00000{number}.json"):
        ledger.entries()
    with pytest.raises(ReleaseError):
        append(ledger, Action.HOLD, after=5)


@pytest.mark.parametrize("number", [1, 3, 5])
def test_any_flipped_bit_is_refused(ledger, five, number):
    """One flipped bit anywhere in an entry is noticed."""
    path = five / f"{number:06d}.json"
    data = path.read_bytes()
    for at in range(0, len(data), 7):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
        with pytest.raises(ReleaseError, match=f"00000{number}.json"):
            ledger.entries()
    path.write_bytes(data)
    assert len(ledger.entries()) == 5


def test_gaps_swaps_and_truncation_are_refused(ledger, five):
    """A missing, swapped, cut, empty, foreign or unsealed entry is refused with its name."""
    originals = {path.name: path.read_bytes() for path in five.iterdir()}

    def refused(name: str) -> None:
        with pytest.raises(ReleaseError, match=name):
            ledger.entries()
        for path in five.iterdir():
            path.unlink()
        for each, data in originals.items():
            (five / each).write_bytes(data)

    (five / "000002.json").unlink()
    refused("000003.json does not continue entry 1")
    (five / "000002.json").write_bytes(originals["000003.json"])
    (five / "000003.json").write_bytes(originals["000002.json"])
    refused("000002.json")
    for content in (originals["000004.json"][:-20], b"", b"[]", b"null", b"\xff", b'{"number": 4}'):
        (five / "000004.json").write_bytes(content)
        refused("000004.json cannot be read")
    unsealed = {name: value for name, value in json.loads(originals["000005.json"]).items() if name != "seal"}
    (five / "000005.json").write_text(json.dumps(unsealed, sort_keys=True, indent=2))
    refused("000005.json")
    (five / "notes.txt").touch()
    with pytest.raises(ReleaseError, match=r"notes\.txt"):
        ledger.last_number()
    refused("notes.txt")
    assert len(ledger.entries()) == 5


def test_entry_without_snapshot_is_refused(ledger):
    """A promotion, canary or rollback that names no snapshot, or rolls back to one that was not live before, is never written."""
    append(ledger, Action.PROMOTE, "a")
    append(ledger, Action.PROMOTE, "b")
    for action in (Action.PROMOTE, Action.CANARY, Action.ROLLBACK):
        with pytest.raises(ReleaseError, match="names no snapshot"):
            append(ledger, action)
    for target in ("b", "c"):
        with pytest.raises(ReleaseError, match="not live before"):
            append(ledger, Action.ROLLBACK, target)
    assert ledger.last_number() == 2


def test_rollback_leaves_the_line_shorter(ledger):
    """Promote a, b, a, b, roll back to b: that is the earlier b, because a rollback never lands on the release that is live."""
    for snapshot in "abab":
        append(ledger, Action.PROMOTE, snapshot)
    append(ledger, Action.ROLLBACK, "b")
    assert [(release.snapshot_id, release.number) for release in ledger.state().line] == [("a", 1), ("b", 5)]


def test_canary_ends_with_promotion_abort_or_rollback(ledger):
    """A canary stands beside the champion until it is aborted, or a promotion or rollback ends it; a hold leaves it."""
    append(ledger, Action.PROMOTE, "a")
    append(ledger, Action.PROMOTE, "b")
    for action, snapshot in ((Action.ABORT, None), (Action.PROMOTE, "c"), (Action.ROLLBACK, "a")):
        append(ledger, Action.CANARY, "z")
        append(ledger, Action.HOLD)
        assert ledger.state().canary.snapshot_id == "z"
        append(ledger, action, snapshot)
        assert ledger.state().canary is None


def test_actor(monkeypatch):
    """The configured actor wins; without login name or entry in the user table the user id is named."""
    assert current_actor("ci") == "ci"

    def nobody() -> str:
        raise KeyError

    monkeypatch.setattr("getpass.getuser", nobody)
    assert current_actor(None).startswith("uid-")


class Releases(RuleBasedStateMachine):
    """I1 and I2 against a model: a list of live snapshots, a count of entries and of holds, what is pinned and what was given up."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = TemporaryDirectory()
        self.ledger = Ledger(LocalStore(Path(self.folder.name)))
        self.line: list[str] = []
        self.canary: str | None = None
        self.count = 0
        self.holds = 0
        self.pinned: set[str] = set()
        self.collected: set[str] = set()

    def previous(self) -> str | None:
        return next((each for each in reversed(self.line[:-1]) if each not in self.collected | {self.line[-1]}), None)

    def teardown(self) -> None:
        self.folder.cleanup()

    @rule(snapshot=st.sampled_from("abcd"))
    def promote(self, snapshot):
        if snapshot in self.collected:
            with pytest.raises(ReleaseError, match="was collected"):
                append(self.ledger, Action.PROMOTE, snapshot)
            return
        append(self.ledger, Action.PROMOTE, snapshot)
        self.line.append(snapshot)
        self.canary = None
        self.count += 1

    @precondition(lambda self: len(self.line) > 1)
    @rule(data=st.data())
    def rollback(self, data):
        target = data.draw(st.sampled_from(sorted(set(self.line[:-1]))))
        if target in self.collected:
            with pytest.raises(ReleaseError, match="was collected"):
                append(self.ledger, Action.ROLLBACK, target)
            return
        append(self.ledger, Action.ROLLBACK, target)
        while True:
            self.line.pop()
            if self.line[-1] == target:
                break
        self.canary = None
        self.count += 1

    @rule(snapshot=st.sampled_from("abcd"))
    def refused_rollback(self, snapshot):
        if snapshot not in self.line[:-1]:
            with pytest.raises(ReleaseError):
                append(self.ledger, Action.ROLLBACK, snapshot)

    @rule(snapshot=st.sampled_from("abcd"))
    def start_canary(self, snapshot):
        if snapshot in self.collected:
            return
        append(self.ledger, Action.CANARY, snapshot)
        self.canary = snapshot
        self.count += 1

    @rule()
    def abort(self):
        append(self.ledger, Action.ABORT)
        self.canary = None
        self.count += 1

    @rule()
    def hold(self):
        append(self.ledger, Action.HOLD)
        self.holds += 1
        self.count += 1

    @rule()
    def lift(self):
        append(self.ledger, Action.LIFT)
        self.holds = 0
        self.count += 1

    @rule(snapshot=st.sampled_from("abcd"))
    def pin(self, snapshot):
        if snapshot in self.collected:
            return
        append(self.ledger, Action.PIN, snapshot)
        self.pinned.add(snapshot)
        self.count += 1

    @rule(snapshot=st.sampled_from("abcd"))
    def unpin(self, snapshot):
        append(self.ledger, Action.UNPIN, snapshot)
        self.pinned.discard(snapshot)
        self.count += 1

    @rule(snapshot=st.sampled_from("abcd"))
    def collect(self, snapshot):
        kept = self.pinned | {self.canary, self.previous() if self.line else None, self.line[-1] if self.line else None}
        if snapshot in kept:
            with pytest.raises(ReleaseError, match="live, previous, canary or pinned"):
                append(self.ledger, Action.COLLECT, evidence={"snapshots": [snapshot]})
            return
        append(self.ledger, Action.COLLECT, evidence={"snapshots": [snapshot]})
        self.collected.add(snapshot)
        self.count += 1

    @rule()
    def stale_append(self):
        if self.count:
            with pytest.raises(ReleaseConflict):
                append(self.ledger, Action.HOLD, after=self.count - 1)

    @invariant()
    def agrees(self):
        state = self.ledger.state()
        assert [release.snapshot_id for release in state.line] == self.line
        assert (state.champion.snapshot_id if state.champion else None) == (self.line[-1] if self.line else None)
        assert (state.previous.snapshot_id if state.previous else None) == (self.previous() if self.line else None)
        assert (state.canary.snapshot_id if state.canary else None) == self.canary
        assert len(state.holds) == self.holds
        assert (state.pinned, state.collected) == (self.pinned, self.collected)
        assert not state.kept & state.collected
        assert state.number == self.count == self.ledger.last_number()
        assert [entry.number for entry in self.ledger.entries()] == list(range(1, self.count + 1))


TestReleases = Releases.TestCase
TestReleases.settings = settings(max_examples=15, stateful_step_count=20, deadline=None)
