"""Failing system calls, injected by strace: each failure is reported, nothing is half done, and the state stays verified."""

import os
import shutil
import subprocess
import sys
from textwrap import indent

import pytest

from rag_serving.releases import Action, Ledger
from rag_serving.store import LocalStore

CHILD = """
import sys
from pathlib import Path
from rag_serving.errors import RaglineError
from rag_serving.releases import Action, Ledger
from rag_serving.store import LocalStore
store = LocalStore(Path(sys.argv[1]))
try:
{act}
except RaglineError as error:
    print("refused", error.code)
else:
    print("done")
"""
ACTS = {
    "write": 'store.write("a/current", b"new")',
    "create": 'store.create("a/next", b"new")',
    "append": 'Ledger(store).append(Action.HOLD, after=1, actor="child", reason="fault")',
    "publish": 'with store.staging("snapshots/one") as folder:\n'
    '    (folder / "file").write_bytes(b"new")\n'
    '    store.publish(folder, "snapshots/one")',
}
FAULTS = [
    ("write", "fsync", "EIO"),
    ("write", "rename", "ENOSPC"),
    ("create", "fsync", "ENOSPC"),
    ("create", "linkat,link", "EIO"),
    ("append", "fsync", "EIO"),
    ("append", "linkat,link", "ENOSPC"),
    ("publish", "fsync", "EIO"),
    ("publish", "rename", "EIO"),
    ("publish", "mkdir,mkdirat", "ENOSPC"),
]


def traced(root, act: str, *options: str) -> str:
    script = CHILD.format(act=indent(ACTS[act], "    "))
    command = ["strace", "-f", "-qq", "--seccomp-bpf", "-o", "/dev/null", *options, sys.executable, "-c", script, str(root)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})
    return done.stdout.strip() or f"crashed: {done.stderr[-300:]}"


def can_inject() -> bool:
    probe = ["strace", "-f", "-qq", "--seccomp-bpf", "-o", "/dev/null", "-e", "trace=fsync", "-e", "inject=fsync:error=EIO", "true"]
    return bool(shutil.which("strace")) and subprocess.run(probe, check=False, capture_output=True).returncode == 0


pytestmark = pytest.mark.skipif(not can_inject(), reason="needs strace with the right to trace")


def check(store: LocalStore, act: str, *, done: bool) -> None:
    """Old state or new state, whole; new when the child said so."""
    assert store.read("a/current") in ((b"new",) if done and act == "write" else (b"old", b"new"))
    assert store.exists("a/next") or not (done and act == "create")
    assert len(Ledger(store).entries()) in ((2,) if done and act == "append" else (1, 2))
    assert store.names("snapshots") == ["one"] or not (done and act == "publish")
    for key in store.names("snapshots"):
        assert (store.folder(f"snapshots/{key}") / "file").read_bytes() == b"new"
    if store.exists("a/next"):
        assert store.read("a/next") == b"new"


@pytest.mark.parametrize(("act", "calls", "error"), FAULTS, ids=lambda value: value.split(",")[0])
def test_each_call_may_fail(tmp_path, act, calls, error):
    """The first, second, ... system call of a kind fails until none is left: a StoreError each time, no debris, and it works once healed."""
    refused = 0
    for nth in range(1, 12):
        store = LocalStore(tmp_path / f"store-{nth}")
        store.write("a/current", b"old")
        Ledger(store).append(Action.HOLD, after=0, actor="parent", reason="first")
        said = traced(store.root, act, "-e", f"trace={calls}", "-e", f"inject={calls}:error={error}:when={nth}")
        assert said in ("done", "refused store"), said
        check(store, act, done=said == "done")
        assert not list(store.root.rglob(".staging-*"))
        if said == "done":
            break
        refused += 1
    assert said == "done"
    assert refused >= 1
