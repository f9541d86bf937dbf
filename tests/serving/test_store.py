"""The local store: keys, durability, create-if-absent and write-once folders."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag_serving.errors import AlreadyExists, StoreError
from rag_serving.store import LocalStore

RACE = """
import sys, time
from pathlib import Path
from rag_serving.errors import AlreadyExists
from rag_serving.store import LocalStore
root, me, rounds = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
store, won = LocalStore(root / "store"), []
(root / f"ready-{me}").touch()
while not (root / "go").exists():
    time.sleep(0.001)
for number in range(rounds):
    try:
        store.create(f"releases/{number}", me.encode() * 1000)
    except AlreadyExists:
        continue
    won.append(number)
print(*won)
"""


def files_below(root: Path) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


def test_write_read_replace(store):
    """What was written is read; writing again replaces it; no temporary file stays."""
    store.write("a/b/c.json", b"one")
    store.write("a/b/c.json", b"two")
    assert store.read("a/b/c.json") == b"two"
    assert files_below(store.root) == ["a/b/c.json"]


def test_create_only_once(store):
    """A taken key refuses a second create and keeps its bytes."""
    store.create("a/1", b"one")
    with pytest.raises(AlreadyExists, match="'a/1'"):
        store.create("a/1", b"two")
    assert store.read("a/1") == b"one"
    assert files_below(store.root) == ["a/1"]


def test_create_of_eight_processes_has_one_winner(tmp_path):
    """Of 8 processes creating the same 40 keys at once, exactly one wins each key, and its bytes are whole."""
    rounds, names = 40, "abcdefgh"
    children = [
        subprocess.Popen([sys.executable, "-c", RACE, str(tmp_path), name, str(rounds)], stdout=subprocess.PIPE, text=True)
        for name in names
    ]
    while len(list(tmp_path.glob("ready-*"))) < len(names):
        assert all(child.poll() is None for child in children)
    (tmp_path / "go").touch()
    outputs = [child.communicate()[0] for child in children]
    assert all(child.returncode == 0 for child in children)
    won = {name: [int(each) for each in output.split()] for name, output in zip(names, outputs, strict=True)}
    assert Counter(number for numbers in won.values() for number in numbers) == Counter(range(rounds))
    store = LocalStore(tmp_path / "store")
    assert all(store.read(f"releases/{number}") == name.encode() * 1000 for name, numbers in won.items() for number in numbers)
    assert files_below(store.root) == sorted(f"releases/{number}" for number in range(rounds))


HOSTILE = [
    *("", "/", "../x", "a/../../x", "/etc/passwd", "a//b", "a/", ".", "..", ".hidden", "a/.staging-1", "a\x00b", "a\n", "a b", "a\\b", "é"),
    "a" * 129,
]


@pytest.mark.parametrize("key", HOSTILE)
def test_hostile_keys_are_refused_everywhere(store, tmp_path, key):
    """A key that is not plain names joined by '/' is refused by every operation, and nothing is written anywhere."""
    folder = tmp_path / "folder"
    folder.mkdir()
    calls = [
        lambda: store.read(key),
        lambda: store.write(key, b""),
        lambda: store.create(key, b""),
        lambda: store.exists(key),
        lambda: store.names(key),
        lambda: store.staging(key).__enter__(),
        lambda: store.publish(folder, key),
        lambda: store.folder(key),
    ]
    for call in calls:
        with pytest.raises(StoreError, match="not a valid store key"):
            call()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder"]


@given(st.text(st.sampled_from("a./\\\n\x00-_~ é"), max_size=12))
def test_any_accepted_key_stays_below_the_root(key):
    """For any text, either the key is refused or its path lies strictly below the root and is not hidden."""
    root = Path("/nowhere/store")
    try:
        path = LocalStore(root)._path(key)
    except StoreError:
        return
    assert Path(os.path.normpath(path)) == path
    assert path.is_relative_to(root)
    assert path != root
    assert not any(part.startswith(".") for part in path.relative_to(root).parts)


def test_absent_keys(store):
    """Reading or opening what is not there is a StoreError; listing it is empty."""
    for call in (lambda: store.read("a/b"), lambda: store.folder("a/b")):
        with pytest.raises(StoreError, match="'a/b'"):
            call()
    assert store.names("a") == []
    assert not store.exists("a/b")
    assert not store.root.exists()


def test_names_leave_out_unfinished_work(store):
    """A staged folder is not listed until it is published; a failed one is removed."""
    store.write("snapshots/b", b"")
    with store.staging("snapshots/a") as folder:
        (folder / "file").write_bytes(b"x")
        assert store.names("snapshots") == ["b"]
        store.publish(folder, "snapshots/a")
        assert store.names("snapshots") == ["a", "b"]
    assert (store.folder("snapshots/a") / "file").read_bytes() == b"x"
    with pytest.raises(FileExistsError), store.staging("snapshots/c") as folder:
        folder.mkdir()
    assert sorted(path.name for path in (store.root / "snapshots").iterdir()) == ["a", "b"]


@pytest.mark.parametrize("taken", ["folder", "empty folder", "file"])
def test_publish_never_replaces(store, taken):
    """Publishing to a taken key, even an empty folder, is AlreadyExists, and both sides stay as they were."""
    if taken == "file":
        store.write("snapshots/a", b"old")
    else:
        (store.root / "snapshots" / "a").mkdir(parents=True)
        if taken == "folder":
            (store.root / "snapshots" / "a" / "old").touch()
    before = files_below(store.root)
    with store.staging("snapshots/a") as folder:
        (folder / "new").touch()
        with pytest.raises(AlreadyExists):
            store.publish(folder, "snapshots/a")
    assert files_below(store.root) == before


def test_publish_makes_the_parent(store):
    """A folder staged elsewhere can be published under a prefix that does not exist yet."""
    with store.staging("work/a") as folder:
        (folder / "file").touch()
        store.publish(folder, "deep/er/a")
    assert store.names("deep/er") == ["a"]


def test_unwritable_store_is_a_store_error(tmp_path):
    """A root that cannot be made, or a key under a file, is a StoreError that says which, not a bare OSError."""
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="cannot create"):
        LocalStore(tmp_path / "file" / "store").write("a", b"")
    store = LocalStore(tmp_path / "store")
    store.write("a/b", b"")
    for call in (lambda: store.write("a/b/c", b""), lambda: store.create("a/b/c", b""), lambda: store.write("a", b"")):
        with pytest.raises(StoreError):
            call()
    assert files_below(store.root) == ["a/b"]


def test_removed_is_gone(store):
    """Bytes and folders vanish with their names and leave nothing hidden behind; what is not there may be removed too."""
    store.write("a/bytes", b"1")
    store.write("a/folder/part", b"2")
    for key in ("a/bytes", "a/folder", "a/never", "never/there"):
        store.remove(key)
        assert not store.exists(key)
    assert list((store.root / "a").iterdir()) == []
