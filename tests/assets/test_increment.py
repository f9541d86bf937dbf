"""Incremental snapshots: the same rows as a full build gives, from a parent that stays byte for byte what it was."""

import asyncio
import hashlib
import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from small_line import MODEL, chunk_table, passages, recipe_of, vectors_of

from rag_assets import indexing
from rag_assets.increments import affordable, find_parent
from rag_assets.indexing import build_snapshot
from rag_serving.retrieval import Retriever
from rag_serving.settings import Index, Retrieval
from rag_serving.snapshots import hash_tree, snapshot_ids, snapshot_key, verify
from rag_serving.store import LocalStore

ROWS = 400
BUILDS = """
import sys
from pathlib import Path
from test_increment import base, build, changed
from rag_serving.store import LocalStore
store = LocalStore(Path(sys.argv[1]))
parent, _ = build(store, base())
print("ready", flush=True)
for number in range(1000):
    build(store, changed(seed=number), parent=parent)
    print(number, flush=True)
"""


def base() -> pa.Table:
    return chunk_table(passages(ROWS))


def changed(*, seed: int = 0) -> pa.Table:
    """Without the documents 0 to 7, with new texts in 8 to 15, new titles on the chunks 16 to 19, and ten new documents."""
    texts = passages(ROWS)
    for number in range(8, 16):
        texts[number] = f"rewritten {seed} passage {number} about subject{number}"
    chunks = chunk_table([*texts, *passages(10, tag=f"new{seed}")])
    titles = chunks["title"].to_pylist()
    titles[16:20] = [f"renamed {seed} {number}" for number in range(4)]
    return chunks.set_column(chunks.schema.get_field_index("title"), "title", pa.array(titles)).slice(8)


def build(store, chunks, *, parent=None, indexed=True, **recipe):
    identity = hashlib.sha256(repr(chunks.to_pydict()).encode()).hexdigest()
    made = replace(recipe_of(chunks, hnsw_from_rows=100 if indexed else 10_000, **recipe), corpus_sha256=identity)
    return asyncio.run(build_snapshot(store, made, chunks, *vectors_of(chunks), parent=parent))


def state_of(store, manifest):
    folder = store.folder(snapshot_key(manifest.snapshot_id))
    return hash_tree(folder), {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def searched(store, manifest, queries, *, k=10, model=MODEL):
    """For each query the exact nearest chunk ids, those of the search as served, and what the words alone find."""

    async def run():
        retriever = await Retriever.open(store, manifest.snapshot_id)
        try:
            found = []
            for query, vector in zip(queries, model.encode_queries(queries), strict=True):
                exact = retriever._table.query().nearest_to(vector).column("vector").distance_type("cosine").limit(k).bypass_vector_index()
                nearest = (await exact.select(["chunk_id", "_distance"]).to_arrow())["chunk_id"].to_pylist()
                hits = await retriever.retrieve(query, vector, k=k)
                words = await retriever.retrieve(query, None, k=k)
                found.append((nearest, [hit.chunk_id for hit in hits], [hit.chunk_id for hit in words]))
            return found
        finally:
            retriever.close()

    return asyncio.run(run())


@pytest.mark.parametrize("indexed", [False, True], ids=["exact", "indexed"])
def test_equal_to_a_full_build(store, tmp_path, indexed):
    """Merged and rebuilt snapshots of the same rows find the same chunks: exactly the same by exact search, nearly all by the index."""
    parent, _ = build(store, base(), indexed=indexed)
    before = state_of(store, parent)
    child, health = build(store, changed(), parent=parent, indexed=indexed)
    full, full_health = build(LocalStore(tmp_path / "other"), changed(), indexed=indexed)
    assert (child.built, child.parent, full.built) == ("incremental", parent.snapshot_id, "full")
    assert child.delta == {"added": 18, "changed": 4, "removed": 16, "since_full": 38, "generation": 1}
    for name in ("rows", "documents", "title_distinctness", "index", "build_key"):
        assert getattr(child, name) == getattr(full, name), name
    assert health.coverage == full_health.coverage
    assert min(health.ann_recall, full_health.ann_recall) >= 0.95
    queries = passages(ROWS)[::40] + [f"rewritten 0 passage {number} about subject{number}" for number in range(8, 16)]
    merged, rebuilt = searched(store, child, queries), searched(LocalStore(tmp_path / "other"), full, queries)
    assert [exact for exact, *_ in merged] == [exact for exact, *_ in rebuilt]
    assert np.mean([len({*ours} & {*theirs}) / 10 for (_, ours, _), (_, theirs, _) in zip(merged, rebuilt, strict=True)]) >= 0.95
    assert state_of(store, parent) == before
    assert verify(store, parent.snapshot_id) == parent
    assert verify(store, child.snapshot_id) == child


def test_nothing_of_the_old_rows_is_found(store):
    """A deleted document, a rewritten text and a replaced title are gone from vector search and from full text, however many hits are asked."""
    parent, _ = build(store, base())
    child, _ = build(store, changed(), parent=parent)
    gone = set(base()["chunk_id"].to_pylist()[:16])
    for results in searched(store, child, [*passages(16), "title 16"], k=child.rows):
        for found in results:
            assert not gone & set(found)
            assert len(found) == len(set(found))
    chunks = set(changed()["chunk_id"].to_pylist())
    ((every, *_),) = searched(store, child, ["passage"], k=10 * child.rows)
    assert set(every) == chunks
    assert len(every) == len(chunks)


def test_the_child_holds_one_version(store):
    """What only the parent needs is not in the child, and what they share is stored once."""
    parent, _ = build(store, base())
    child, _ = build(store, changed(), parent=parent)
    folders = [store.folder(snapshot_key(each.snapshot_id)) for each in (parent, child)]
    assert [len(list((folder / "chunks.lance" / "_versions").glob("*.manifest"))) for folder in folders] == [1, 1]
    shared = {path.stat().st_ino for path in folders[0].rglob("*.*")} & {path.stat().st_ino for path in folders[1].rglob("*.*")}
    assert shared
    assert child.bytes < 1.5 * parent.bytes


def test_one_after_another(store):
    """Increments of increments stay sound and count up; at `rebuild_after`, and when the changes add up to `rebuild_share`, comes a full build."""
    newest, _ = build(store, base())
    built = []
    for seed in range(4):
        recipe = recipe_of(changed(seed=seed), hnsw_from_rows=100)
        assert find_parent(store, recipe) == newest
        newest, health = build(store, changed(seed=seed), parent=newest)
        assert health.problems == []
        built.append((newest.built, newest.delta.get("generation"), newest.delta.get("since_full")))
    assert built == [("incremental", 1, 38), ("incremental", 2, 78), ("full", None, None), ("incremental", 1, 40)]
    limited = replace(recipe, index=Index(hnsw_from_rows=100, rebuild_after=1))
    assert not affordable(limited, newest, delta=1, rows=newest.rows)
    assert affordable(limited, newest, delta=0, rows=newest.rows)


def test_unchanged_rows_searched_differently(store):
    """Other fusion weights over the same rows need no build: the files are the parent's, the manifest is new."""
    parent, _ = build(store, base())
    child, _ = build(store, base(), parent=parent, retrieval=Retrieval(candidates=50))
    assert (child.built, child.delta["generation"], child.retrieval["candidates"]) == ("incremental", 0, 50)
    data = [{name: entry for name, entry in each.files.items() if "/data/" in name or "/_indices/" in name} for each in (parent, child)]
    assert data[0] == data[1]


@pytest.mark.parametrize("settings", [{"rebuild_share": 0.05}, {"rebuild_after": 0}, {"hnsw_from_rows": 500}], ids=str)
def test_not_affordable(store, settings):
    """Too large a change, no increments allowed, or rows that cross the threshold of the vector index: built in full."""
    parent, _ = build(store, base())
    recipe = replace(recipe_of(changed()), index=Index(**{"hnsw_from_rows": 100, **settings}))
    child, _ = asyncio.run(build_snapshot(store, recipe, changed(), *vectors_of(changed()), parent=parent))
    assert (child.built, child.parent) == ("full", None)


@pytest.mark.parametrize("change", [{"m": 24}, {"ef_construction": 200}, {"chunking": 1}, {"fingerprint": 1}], ids=str)
def test_no_parent_of_another_structure(store, change):
    """A snapshot of another model, chunking or index structure is no parent; a search-time setting makes no difference."""
    parent, _ = build(store, base())
    recipe = recipe_of(base(), hnsw_from_rows=100)
    assert find_parent(store, replace(recipe, index=Index(hnsw_from_rows=100, ef=64))) == parent
    other = {"chunking": {"chunking": {"max_tokens": 100}}, "fingerprint": {"fingerprint": "f" * 64}}.get(next(iter(change)))
    assert find_parent(store, replace(recipe, **(other or {"index": Index(hnsw_from_rows=100, **change)}))) is None


@pytest.mark.parametrize("part", ["/data/", "/_indices/", "/_versions/"])
def test_a_damaged_parent_is_not_gone_on_from(store, part, caplog):
    """A flipped bit in any part of the parent is noticed before a child has it: the build is full, sound, and says why."""
    parent, _ = build(store, base())
    folder = store.folder(snapshot_key(parent.snapshot_id))
    name = max((name for name in parent.files if part in name), key=lambda name: parent.files[name]["size"])
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1]) + whole[len(whole) // 2 + 1 :])
    with caplog.at_level(logging.WARNING, logger="ragline"):
        child, health = build(store, changed(), parent=parent)
    assert (child.built, health.problems) == ("full", [])
    assert verify(store, child.snapshot_id) == child
    assert f"{name} was altered" in caplog.text


def test_an_unsound_increment_gives_way(store, monkeypatch, caplog):
    """An increment whose approximate search falls below the floor is thrown away, and a full build takes its place."""
    parent, _ = build(store, base())
    monkeypatch.setattr(indexing, "_ANN_FLOOR", 1.01)
    with caplog.at_level(logging.WARNING, logger="ragline"):
        child, _ = build(store, changed(), parent=parent)
    assert (child.built, child.parent, child.delta) == ("full", None, {})
    assert "approximate search finds" in caplog.text
    assert len(list((store.root / "snapshots").iterdir())) == 2


def test_killed_while_merging(store):
    """Killed at random moments of increments: the parent and every visible snapshot verify, and the next increment succeeds."""
    environ = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (Path(__file__).parents[1], Path(__file__).parent))),
        "OMP_NUM_THREADS": "1",
    }
    rng = np.random.default_rng(5)
    for _ in range(2):
        command = [sys.executable, "-W", "ignore", "-c", BUILDS, str(store.root)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ) as child:
            assert child.stdout.readline() == "ready\n"
            child.stdout.readline()
            time.sleep(rng.uniform(0, 0.5))
            child.send_signal(signal.SIGKILL)
        assert all(verify(store, snapshot_id) for snapshot_id in snapshot_ids(store))
    parent, _ = build(store, base())
    assert build(store, changed(seed=-1), parent=parent)[0].built == "incremental"
