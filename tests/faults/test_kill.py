"""kill -9 at any moment: readers see the old state or the new one, and the next run succeeds."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from small_line import build, passages

from rag_serving.errors import StoreError
from rag_serving.releases import Ledger
from rag_serving.snapshots import snapshot_ids, verify
from rag_serving.store import LocalStore

TESTS = Path(__file__).parents[1]
WRITE = """
import sys
from pathlib import Path
from rag_serving.store import LocalStore
store, number = LocalStore(Path(sys.argv[1])), 0
while True:
    number += 1
    store.write("a/current", b"%06d" % number * 20_000)
    print(number, flush=True)
"""
APPEND = """
import sys
from pathlib import Path
from rag_serving.releases import Action, Ledger
from rag_serving.store import LocalStore
ledger = Ledger(LocalStore(Path(sys.argv[1])))
while True:
    entry = ledger.append(Action.HOLD, after=ledger.last_number(), actor="child", reason="loop")
    print(entry.number, flush=True)
"""
BUILDS = """
import os, sys
from pathlib import Path
import lancedb
from small_line import build, passages
from rag_serving.store import LocalStore
store = LocalStore(Path(sys.argv[1]))
while sys.stdin.readline():
    pid = os.fork()
    if pid:
        sys.stdin.readline()
        os.waitpid(pid, 0)
        print("ended", flush=True)
    else:
        print(os.getpid(), flush=True)
        build(store, passages(110, tag="killed"), hnsw_from_rows=100)
        os._exit(0)
"""


def start(script: str, root: Path) -> subprocess.Popen[str]:
    environ = {**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", script, str(root)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ)


def kill_after(child: subprocess.Popen[str], seconds: float) -> list[str]:
    """Wait for the first line, then this long, kill, and give all lines that were acknowledged."""
    with child:
        first = child.stdout.readline()
        time.sleep(seconds)
        child.send_signal(signal.SIGKILL)
        return (first + child.stdout.read()).split("\n")[:-1]


def test_write_is_whole_and_acknowledged_bytes_stay(store):
    """Killed at ten random moments while replacing 120 kB: the value is one that was written, never older than the last acknowledged."""
    rng = np.random.default_rng(0)
    for _ in range(10):
        acknowledged = int(kill_after(start(WRITE, store.root), rng.uniform(0, 0.05))[-1])
        value = store.read("a/current")
        assert len(value) == 120_000
        assert value == value[:6] * 20_000
        assert int(value[:6]) in (acknowledged, acknowledged + 1)
        assert store.names("a") == ["current"]


def test_acknowledged_entries_survive(store):
    """Killed at five random moments while appending: every acknowledged entry is there, the chain verifies, and appending goes on (I8)."""
    rng = np.random.default_rng(1)
    for _ in range(5):
        acknowledged = int(kill_after(start(APPEND, store.root), rng.uniform(0, 0.2))[-1])
        entries = Ledger(store).entries()
        assert len(entries) in (acknowledged, acknowledged + 1)
        assert Ledger(store).last_number() == len(entries)


def test_killed_builds_leave_no_half_snapshot(line):
    """Killed at ten random moments of a build: nothing or a verified snapshot is visible, and the next build succeeds (I10)."""
    rng = np.random.default_rng(2)
    store, _ = line
    before = snapshot_ids(store)
    started = time.perf_counter()
    build(LocalStore(store.root.with_name("measured")), passages(110, tag="killed"), hnsw_from_rows=100)
    whole = time.perf_counter() - started
    with start(BUILDS, store.root) as builder:
        for _ in range(10):
            print(file=builder.stdin, flush=True)
            pid = int(builder.stdout.readline())
            time.sleep(rng.uniform(0, whole))
            os.kill(pid, signal.SIGKILL)
            print(file=builder.stdin, flush=True)
            assert builder.stdout.readline() == "ended\n"
            assert all(verify(store, snapshot_id) for snapshot_id in snapshot_ids(store))
            assert set(before) <= set(snapshot_ids(store))
            assert len(snapshot_ids(store)) <= len(before) + 1
        builder.stdin.close()
    assert list((store.root / "snapshots").glob(".staging-build-*")), "no kill hit a build under way"
    manifest, _ = build(store, passages(110, tag="killed"), hnsw_from_rows=100)
    assert verify(store, manifest.snapshot_id) == manifest
    assert len(snapshot_ids(store)) == len(before) + 1


def test_killed_before_the_rename_shows_nothing(store):
    """A staged folder left behind by a kill is no snapshot, no name and no key."""
    (store.root / "snapshots" / ".staging-build-0123abcd").mkdir(parents=True)
    assert snapshot_ids(store) == []
    with pytest.raises(StoreError, match="not a valid store key"):
        store.folder("snapshots/.staging-build-0123abcd")
