"""Snapshots: what a manifest promises, what verification finds, and that reading leaves no trace."""

import asyncio
import hashlib
import json
import os
import re
import shutil

import pytest
from small_line import MODEL, build, passages

from rag_serving.errors import SnapshotError
from rag_serving.retrieval import Retriever
from rag_serving.snapshots import (
    MANIFEST,
    check_inherited,
    find_by_build_key,
    hash_tree,
    link_files,
    read_manifest,
    snapshot_ids,
    snapshot_key,
    verify,
)


@pytest.fixture
def snapshot(line):
    """A store, the HNSW-indexed snapshot's manifest and its folder."""
    store, (*_, manifest) = line
    return store, manifest, store.folder(snapshot_key(manifest.snapshot_id))


def test_manifest_names_every_byte(snapshot):
    """The manifest lists each file with its sha256 and size, and the id ends in 12 digits of the manifest's hash."""
    store, manifest, folder = snapshot
    assert verify(store, manifest.snapshot_id) == manifest
    listed = {name: (entry["sha256"], entry["size"]) for name, entry in manifest.files.items()}
    real = {
        path.relative_to(folder).as_posix(): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size)
        for path in folder.rglob("*")
        if path.is_file() and path.name != MANIFEST
    }
    assert listed == real
    assert manifest.bytes == sum(size for _, size in real.values())
    assert manifest.snapshot_id == f"hashing-64-{hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()[:12]}"
    assert re.fullmatch(r"[a-z0-9][a-z0-9-]{7,63}", manifest.snapshot_id)


def test_every_file_is_guarded(snapshot):
    """For each file in turn: one flipped bit, a cut, an emptying and a removal are each found, by the file's name."""
    store, manifest, folder = snapshot
    for name in manifest.files:
        path = folder / name
        data = path.read_bytes()
        middle = len(data) // 2
        for damaged in (data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :], data[:-1], b""):
            path.write_bytes(damaged)
            with pytest.raises(SnapshotError, match=re.escape(f"{name} was altered")):
                verify(store, manifest.snapshot_id)
        path.unlink()
        with pytest.raises(SnapshotError, match=re.escape(f"{name} is missing")):
            verify(store, manifest.snapshot_id)
        path.write_bytes(data)
    assert verify(store, manifest.snapshot_id)


@pytest.mark.parametrize("name", ["extra", ".hidden", "chunks.lance/_versions/999.manifest", f"chunks.lance/{MANIFEST}"])
def test_extra_files_are_found(snapshot, name):
    """A file that the manifest does not list is found, wherever it hides and whatever its name."""
    store, manifest, folder = snapshot
    (folder / name).touch()
    with pytest.raises(SnapshotError, match=re.escape(f"{name} does not belong there")):
        verify(store, manifest.snapshot_id)


@pytest.mark.parametrize("kind", ["link to a copy", "link to a folder", "dangling link", "pipe"])
def test_links_and_pipes_are_refused(snapshot, tmp_path, kind):
    """A link, even to the right bytes, and anything that is not a regular file are refused without being read."""
    store, manifest, folder = snapshot
    path = folder / next(iter(manifest.files))
    if kind == "link to a copy":
        shutil.move(path, tmp_path / "copy")
        path.symlink_to(tmp_path / "copy")
    elif kind == "pipe":
        os.mkfifo(folder / "pipe")
    else:
        (folder / "link").symlink_to(tmp_path if kind == "link to a folder" else tmp_path / "nowhere")
    with pytest.raises(SnapshotError, match="is a link or no regular file"):
        verify(store, manifest.snapshot_id)


def test_any_change_of_the_manifest_is_found(snapshot):
    """A flipped bit anywhere in the manifest, another layout of the same fields, or no manifest: refused before any file is read."""
    store, manifest, folder = snapshot
    path = folder / MANIFEST
    data = path.read_bytes()
    damaged = [data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :] for at in range(0, len(data), 37)]
    fields = json.loads(data)
    damaged += [json.dumps(fields).encode(), data + b"\n", b"", b"[]", b"null", json.dumps({**fields, "embedding_model": 3}).encode()]
    for each in damaged:
        path.write_bytes(each)
        with pytest.raises(SnapshotError, match="manifest of"):
            read_manifest(store, manifest.snapshot_id)
    path.unlink()
    with pytest.raises(SnapshotError, match="cannot be read"):
        read_manifest(store, manifest.snapshot_id)


def test_a_renamed_snapshot_is_refused(snapshot):
    """A folder under another snapshot's name is refused: the id is bound to the manifest."""
    store, _, folder = snapshot
    folder.rename(folder.with_name("hashing-64-0123456789ab"))
    with pytest.raises(SnapshotError, match="was altered"):
        verify(store, "hashing-64-0123456789ab")


@pytest.mark.parametrize("text", ["", "../ledger", "a/b", "UPPER-case-id", "short", "hashing-64-0123456789ab\n", "x" * 65, ".hidden-id"])
def test_what_is_no_id_is_refused(store, text):
    """Text from a request or a command line that is not an id never becomes a path."""
    for call in (snapshot_key, lambda each: verify(store, each), lambda each: read_manifest(store, each)):
        with pytest.raises(SnapshotError, match="is not a snapshot id"):
            call(text)


def test_absent_snapshot_is_named(store):
    """An id that is not in the store is a SnapshotError, not an empty snapshot, and nothing is created."""
    with pytest.raises(SnapshotError, match="there is no snapshot hashing-64-0123456789ab"):
        asyncio.run(Retriever.open(store, "hashing-64-0123456789ab"))
    assert not store.root.exists()
    assert snapshot_ids(store) == []


def test_searching_leaves_no_trace(snapshot):
    """Opening, warming and 50 searches leave the file list, every byte and every modification time as they were."""
    store, manifest, folder = snapshot

    def state():
        return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}, hash_tree(folder)

    async def search() -> None:
        retriever = await Retriever.open(store, manifest.snapshot_id)
        await retriever.warm_up()
        vectors = MODEL.encode_queries(passages(50))
        for text, vector in zip(passages(50), vectors, strict=True):
            assert await retriever.retrieve(text, vector, k=10)
        retriever.close()

    before = state()
    asyncio.run(search())
    assert state() == before
    assert verify(store, manifest.snapshot_id) == manifest


def test_opening_verifies(snapshot):
    """A damaged snapshot does not open."""
    store, manifest, folder = snapshot
    (folder / "extra").touch()
    with pytest.raises(SnapshotError, match="extra does not belong there"):
        asyncio.run(Retriever.open(store, manifest.snapshot_id))


def test_a_damaged_snapshot_can_be_built_again(store):
    """The same inputs give the stored snapshot while it is intact; once damaged it does not count, and a build gives a new one."""
    manifest, health = build(store, passages(20))
    assert health is not None
    assert build(store, passages(20)) == (manifest, None)
    (store.folder(snapshot_key(manifest.snapshot_id)) / "extra").touch()
    assert find_by_build_key(store, manifest.build_key) is None
    again, health = build(store, passages(20))
    assert health is not None
    assert again.snapshot_id != manifest.snapshot_id
    assert verify(store, again.snapshot_id) == again


def test_foreign_folders_are_not_snapshots(line):
    """Names below snapshots/ that are no ids are not listed; one without a manifest breaks no search by build key."""
    store, manifests = line
    store.write("snapshots/NOTES.txt", b"")
    store.write("snapshots/half-built-snapshot/file", b"")
    assert "NOTES.txt" not in snapshot_ids(store)
    assert find_by_build_key(store, manifests[0].build_key) == manifests[0]


@pytest.mark.parametrize("form", [1, 2, 4, "3", None])
def test_other_manifest_formats_are_refused(snapshot, form):
    """A manifest of another format, also under the id of its own bytes, is refused by number with what to do: it may hold no access lists."""
    store, manifest, folder = snapshot
    fields = {
        name: value for name, value in json.loads(manifest.encode()).items() if name not in ("built", "delta", "restricted", "rerank")
    }
    data = json.dumps({**fields, "format": form}, sort_keys=True, indent=2).encode()
    snapshot_id = f"hashing-64-{hashlib.sha256(data).hexdigest()[:12]}"
    (folder / MANIFEST).write_bytes(data)
    folder.rename(folder.with_name(snapshot_id))
    with pytest.raises(SnapshotError, match=rf"has manifest format {form!r}; only format 3 is read. Build it again: `ragline run`"):
        verify(store, snapshot_id)
    assert find_by_build_key(store, manifest.build_key) is None


@pytest.mark.parametrize("links", [True, False], ids=["links", "copies"])
def test_a_file_that_changed_on_the_way_is_found(snapshot, tmp_path, monkeypatch, links):
    """A child has every file of its parent; one that was written in place is found by name, the replaced version hint is not."""
    _, manifest, folder = snapshot
    if not links:
        monkeypatch.setattr(os, "link", lambda *_, **__: (_ for _ in ()).throw(OSError("no links here")))
    link_files(folder, tmp_path / "child")
    files = hash_tree(tmp_path / "child")
    assert files == manifest.files
    check_inherited(tmp_path / "child", files, folder, manifest)
    hint = next(name for name in files if name.endswith("latest_version_hint.json"))
    (tmp_path / "child" / hint).unlink()
    (tmp_path / "child" / hint).write_text("another")
    check_inherited(tmp_path / "child", hash_tree(tmp_path / "child"), folder, manifest)
    data = next(name for name in files if "/data/" in name)
    with (tmp_path / "child" / data).open("r+b") as file:
        file.write(b"x")
    with pytest.raises(SnapshotError, match=re.escape(f"{data} was altered")):
        check_inherited(tmp_path / "child", hash_tree(tmp_path / "child"), folder, manifest)
