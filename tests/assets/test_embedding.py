"""Content-addressed embeddings: computed once, in order, refused when damaged."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from small_line import MODEL, SPEC, passages

from rag_assets import embedding
from rag_assets.embedding import check_vectors, embed, embed_missing, known_fingerprint, remember_fingerprint
from rag_serving.errors import ModelError, StoreError

RESUME = """
import os, signal, sys
from pathlib import Path
from small_line import MODEL, passages
from rag_assets.embedding import embed
from rag_serving.store import LocalStore

def stop(done, total):
    print(done, total, flush=True)
    if done >= int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)

embed(LocalStore(Path(sys.argv[1])), MODEL, passages(1600), progress=stop)
"""


class Counting:
    """The hashed model, counting what it was asked to embed."""

    fingerprint = MODEL.fingerprint
    dims = MODEL.dims

    def __init__(self) -> None:
        self.asked: list[str] = []

    def encode_documents(self, texts):
        self.asked.extend(texts)
        return MODEL.encode_documents(texts)


@pytest.fixture
def encoder():
    return Counting()


def test_vectors_are_those_of_the_texts_in_order(store, encoder):
    """Whatever is cached, repeated or reordered, row n is the vector of text n."""
    texts = passages(50)
    embed(store, encoder, texts[10:30])
    asked = [*reversed(texts), texts[3], texts[3]]
    embedded = embed(store, encoder, asked)
    np.testing.assert_array_equal(embedded.vectors, MODEL.encode_documents(asked))
    assert embedded.vectors.dtype == np.float32
    assert embedded.computed == 30


def test_nothing_is_embedded_twice(store, encoder):
    """Each distinct text is embedded once ever, also when it comes twice in one call or in another process's store."""
    texts = passages(700)
    assert embed(store, encoder, texts + texts[:100]).computed == 700
    assert embed(store, encoder, texts).computed == 0
    assert embed(store, encoder, [*texts, "a new one"]).computed == 1
    assert len(encoder.asked) == len(set(encoder.asked)) == 701


def test_no_texts(store, encoder):
    """No texts give an empty matrix of the right width and leave the store as it was."""
    assert embed(store, encoder, []).vectors.shape == (0, MODEL.dims)
    assert not store.root.exists()


def test_another_model_shares_nothing(store, encoder):
    """Vectors of one fingerprint are never those of another."""
    embed(store, encoder, passages(5))
    other = Counting()
    other.fingerprint = "f" * 64
    assert embed(store, other, passages(5)).computed == 5


def test_progress_counts_what_is_computed(store, encoder):
    """`progress` hears (done, to do) of the texts that were not stored, after each committed segment."""
    embed(store, encoder, passages(100))
    heard: list[tuple[int, int]] = []
    embed(store, encoder, passages(1200), progress=lambda done, total: heard.append((done, total)))
    assert heard == [(512, 1100), (1024, 1100), (1100, 1100)]


@pytest.mark.parametrize("stop_after", [512, 1024])
def test_killed_between_segments_keeps_what_was_committed(store, encoder, stop_after):
    """After kill -9 the committed texts are not embedded again, and the vectors come out whole."""
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    child = subprocess.run([sys.executable, "-c", RESUME, str(store.root), str(stop_after)], check=False, capture_output=True, env=environ)
    assert child.returncode == -9, child.stderr
    embedded = embed(store, encoder, passages(1600))
    assert embedded.computed == len(encoder.asked) == 1600 - stop_after
    np.testing.assert_array_equal(embedded.vectors, MODEL.encode_documents(passages(1600)))


def test_a_damaged_segment_is_named(store, encoder):
    """A segment with one flipped bit is refused by name; once it is deleted only its texts are embedded again."""
    embed(store, encoder, passages(600))
    folder = store.root / "embeddings" / MODEL.fingerprint[:32]
    path = min(folder.iterdir(), key=lambda each: each.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match=path.name):
        embed(store, encoder, passages(600))
    path.unlink()
    assert embed(store, encoder, passages(600)).computed == 88


def test_texts_come_in_batches_and_leave_by_length(store, encoder, monkeypatch):
    """More than a window is read twice and never held together: a window is embedded shortest first before the next is filled."""
    monkeypatch.setattr(embedding, "WINDOW_TEXTS", 100)
    texts = [text * (1 + number % 5) for number, text in enumerate(passages(250))]
    read: list[int] = []

    def batches():
        for start in range(0, 250, 50):
            read.append(start)
            yield texts[start : start + 50]

    assert embed_missing(store, encoder, batches) == 250
    assert read == [0, 50, 100, 150, 200] * 2
    for window in (encoder.asked[:100], encoder.asked[100:200], encoder.asked[200:]):
        assert [len(text) for text in window] == sorted(len(text) for text in window)
    assert set(encoder.asked[:100]) == set(texts[:100])
    for few in (0, 1):
        read.clear()
        texts[70] = f"{few} " * few + texts[70]
        assert embed_missing(store, encoder, batches) == few
        assert read == [0, 50, 100, 150, 200]


def test_a_fingerprint_is_remembered_for_its_row_alone(store):
    """A plan may use the fingerprint that a model's row had, but not after a change that could give another, nor for a folder of weights."""
    assert known_fingerprint(store, SPEC) is None
    remember_fingerprint(store, SPEC, MODEL.fingerprint)
    assert known_fingerprint(store, SPEC) == MODEL.fingerprint
    assert known_fingerprint(store, SPEC.model_copy(update={"dense_scale": 3.0})) == MODEL.fingerprint
    for change in ({"document_prompt": "passage: "}, {"max_tokens": 128}, {"dtype": "float32"}, {"source": "hashing:65", "dims": 65}):
        assert known_fingerprint(store, SPEC.model_copy(update=change)) is None
    folder = SPEC.model_copy(update={"source": "path:weights"})
    remember_fingerprint(store, folder, "f" * 64)
    assert known_fingerprint(store, folder) is None


def _spoiled(change):
    vectors = MODEL.encode_documents(passages(4))
    change(vectors)
    return vectors


@pytest.mark.parametrize(
    ("vectors", "match"),
    [
        (_spoiled(lambda rows: rows.__setitem__((2, 3), np.nan)), "1 of 4 vectors"),
        (_spoiled(lambda rows: rows.__setitem__(1, 0)), "1 of 4 vectors"),
        (_spoiled(lambda rows: rows.__imul__(2)), "4 of 4 vectors"),
        (MODEL.encode_documents(passages(4)).astype(np.float64), "float64"),
        (MODEL.encode_documents(passages(3)), r"\(3, 64\)"),
        (MODEL.encode_documents(passages(4))[:, :32], r"\(4, 32\)"),
    ],
    ids=["NaN", "zero", "unnormalised", "float64", "too few", "too short"],
)
def test_bad_vectors_are_never_stored(store, encoder, monkeypatch, vectors, match):
    """What a model gives wrongly is refused, and nothing of it reaches the store."""
    with pytest.raises(ModelError, match=match):
        check_vectors(vectors, rows=4, dims=MODEL.dims)
    monkeypatch.setattr(encoder, "encode_documents", lambda _: vectors)
    with pytest.raises(ModelError, match=match):
        embed(store, encoder, passages(4))
    assert not store.root.exists()
