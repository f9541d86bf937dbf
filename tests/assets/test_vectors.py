"""Stored vectors: found by their text, whatever segment they are in, merged without loss, and refused when damaged."""

import hashlib
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_line import MODEL, passages

from rag_assets import vectors as vectors_module
from rag_assets.vectors import EmbeddingCache, text_keys
from rag_serving.errors import StoreError

PREFIX = f"embeddings/{MODEL.fingerprint[:32]}"
MERGE = """
import sys
from pathlib import Path
from small_line import MODEL, passages
from rag_assets.vectors import EmbeddingCache, text_keys
from rag_serving.store import LocalStore
import rag_assets.vectors as vectors
vectors.MOST_SMALL_SEGMENTS = 4
cache = EmbeddingCache(LocalStore(Path(sys.argv[1])), MODEL.fingerprint, MODEL.dims)
number = len(cache) // 5
while True:
    texts = passages(5, tag=f"part{number}")
    cache.add(text_keys(texts), MODEL.encode_documents(texts))
    number += 1
    print(number, flush=True)
"""


def opened(store):
    return EmbeddingCache(store, MODEL.fingerprint, MODEL.dims)


def add(store, texts, *, each=5):
    cache = opened(store)
    for start in range(0, len(texts), each):
        part = texts[start : start + each]
        cache.add(text_keys(part), MODEL.encode_documents(part))
    return cache


def assert_all_there(store, texts):
    np.testing.assert_array_equal(opened(store).vectors(text_keys(texts)), MODEL.encode_documents(texts))


@pytest.fixture
def small_merges(monkeypatch):
    """Four small segments are merged, into segments of 30 texts or little more."""
    monkeypatch.setattr(vectors_module, "MOST_SMALL_SEGMENTS", 4)
    monkeypatch.setattr(vectors_module, "MERGED_TEXTS", 30)


def test_keys_are_the_hashes_of_the_texts():
    """A key is the sha256 of its text, all 32 bytes of it, also where they end in zeros."""
    ending_in_zero = next(text for text in map(str, range(2000)) if hashlib.sha256(text.encode()).digest()[-1] == 0)
    keys = text_keys(["a", ending_in_zero])
    assert keys.tobytes() == hashlib.sha256(b"a").digest() + hashlib.sha256(ending_in_zero.encode()).digest()
    assert len(text_keys([])) == 0


def test_any_order_from_many_segments(store):
    """Vectors come in the order asked for, repeated or not, from segments of any number."""
    texts = passages(100)
    add(store, texts, each=7)
    asked = [*reversed(texts), texts[3], texts[3]]
    assert_all_there(store, asked)
    assert opened(store).holds(text_keys(["never seen", texts[0]])).tolist() == [False, True]
    assert opened(store).vectors(text_keys([])).shape == (0, MODEL.dims)


def test_a_text_without_vector_is_an_error(store):
    """Asking for a text that was never embedded is refused, not answered with some other vector; also where nothing is stored."""
    for stored in ([], passages(10)):
        add(store, stored)
        with pytest.raises(StoreError, match="1 of 1 texts have no stored vector"):
            opened(store).vectors(text_keys(["never seen"]))


def test_the_same_segment_twice(store):
    """Two processes that commit the same texts leave one segment."""
    for _ in range(2):
        add(store, passages(3))
    assert len(opened(store)) == 3
    assert len(store.names(PREFIX)) == 1


def test_segments_of_earlier_versions_are_read(store):
    """Parquet segments, as earlier versions wrote them, give their vectors beside the new ones, and merge with them."""
    texts = passages(20, tag="old")
    values = pa.FixedSizeListArray.from_arrays(pa.array(MODEL.encode_documents(texts).ravel()), MODEL.dims)
    keys = pa.array([hashlib.sha256(text.encode()).digest() for text in texts], pa.binary(32))
    buffer = io.BytesIO()
    pq.write_table(pa.table({"key": keys, "vector": values}), buffer, compression="zstd")
    store.create(f"{PREFIX}/{hashlib.sha256(buffer.getvalue()).hexdigest()}.parquet", buffer.getvalue())
    assert_all_there(store, texts)
    add(store, passages(10))
    assert_all_there(store, [*passages(10), *texts])


def test_many_small_segments_become_few(store, small_merges):
    """Small segments are merged as they gather; every vector stays, also for a cache that was opened before the merge."""
    texts = passages(200)
    add(store, texts[:15])
    before = opened(store)
    cache = add(store, texts[15:])
    assert len(store.names(PREFIX)) < 15
    assert len(cache) >= 185
    assert_all_there(store, texts)
    np.testing.assert_array_equal(before.vectors(text_keys(texts[:15])), MODEL.encode_documents(texts[:15]))


def test_merging_what_was_merged(store, small_merges):
    """A segment that is alone in its group, and texts that are in two segments, survive a merge: each once."""
    add(store, passages(5))
    for _ in range(6):
        add(store, passages(12), each=4)
        add(store, passages(12)[::-1], each=3)
    assert len(opened(store)) == 12
    assert_all_there(store, passages(12))


def test_opened_while_another_process_merges(store, monkeypatch):
    """A segment that is merged away between naming and reading is looked for again; names that never hold still are an error."""
    add(store, passages(5))
    names, stale = store.names, [f"{'0' * 64}.arrow"]
    monkeypatch.setattr(store, "names", lambda prefix: [*names(prefix), *([stale.pop()] if stale else [])])
    assert_all_there(store, passages(5))
    monkeypatch.setattr(store, "names", lambda prefix: [*names(prefix), f"{'0' * 64}.arrow"])
    with pytest.raises(StoreError, match="change all the time"):
        opened(store)


def test_killed_while_merging(store):
    """Killed at three random moments of adding and merging: every acknowledged text is there, and the next process goes on."""
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    rng = np.random.default_rng(3)
    for _ in range(3):
        command = [sys.executable, "-W", "ignore", "-c", MERGE, str(store.root)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ) as child:
            first = child.stdout.readline()
            time.sleep(rng.uniform(0, 0.1))
            child.send_signal(signal.SIGKILL)
            acknowledged = int((first + child.stdout.read()).split("\n")[-2])
        texts = [text for number in range(acknowledged) for text in passages(5, tag=f"part{number}")]
        assert_all_there(store, texts)


@pytest.mark.parametrize("where", [0.02, 0.5, 0.98], ids=["head", "vectors", "footer"])
def test_a_damaged_segment_is_named(store, where):
    """A flipped bit anywhere in a segment is found before it gives a vector, and the segment is named."""
    add(store, passages(50), each=50)
    path = next((store.root / PREFIX).iterdir())
    data = bytearray(path.read_bytes())
    data[int(len(data) * where)] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match=rf"{path.name} is damaged|no stored vector"):
        opened(store).vectors(text_keys(passages(50)))
    path.unlink()
    assert len(opened(store)) == 0
