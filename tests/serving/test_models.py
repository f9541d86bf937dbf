"""Embedding models: what the vectors promise, and a fingerprint that changes exactly when the vectors may."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag_serving.embedding import weights
from rag_serving.embedding.cpu import thread_count
from rag_serving.errors import ModelError
from rag_serving.models import load_model
from rag_serving.settings import ModelSpec

MODELS_DIR = Path(os.environ.get("RAGLINE_MODELS_DIR") or Path(__file__).parents[2] / ".ragline" / "models")
HASHING = ModelSpec(name="hashing", source="hashing:128", dims=128, max_tokens=256)
MINILM = ModelSpec(name="all-MiniLM-L6-v2", source="wheel:all-MiniLM-L6-v2", dims=384, max_tokens=256, dtype="float32")
WORDLLAMA = ModelSpec(name="wordllama-256", source="wheel:wordllama-256", dims=256, max_tokens=512)
PASSAGES = ["The objects of a bucket are listed in pages.", "A cake is baked at a low heat for an hour.", "Passwords are reset by mail."]
WORDS = st.text(min_size=1, max_size=80).filter(lambda text: text.strip() and text.isprintable())


@pytest.fixture(scope="module")
def minilm():
    return load_model(MINILM, MODELS_DIR)


@pytest.fixture(scope="module")
def wordllama():
    return load_model(WORDLLAMA, MODELS_DIR)


def loaded(spec=HASHING, **changes):
    return load_model(spec.model_copy(update=changes), MODELS_DIR)


def run(script: str, **environ: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env={**os.environ, **environ})
    return done.stdout.strip()


def test_no_torch_without_need():
    """Importing models, encoding and the service, and loading and using hashing:, leave torch unimported."""
    script = (
        "import sys, pathlib\nimport rag_serving.models, rag_serving.encoding, rag_serving.embedder\n"
        "from rag_serving.settings import ModelSpec\n"
        "m = rag_serving.models.load_model(ModelSpec(name='h', source='hashing:64', dims=64, max_tokens=64), pathlib.Path('.'))\n"
        "m.encode_queries(['one text']); m.count_tokens(['one text'])\n"
        "print([name for name in ('torch', 'sentence_transformers', 'transformers') if name in sys.modules])\n"
    )
    assert run(script) == "[]"


def test_hashing_is_the_same_in_every_process():
    """Vectors and fingerprint of hashing: do not depend on the interpreter's hash seed."""
    script = (
        "import hashlib, pathlib\nfrom rag_serving.models import load_model\nfrom rag_serving.settings import ModelSpec\n"
        "m = load_model(ModelSpec(name='hashing', source='hashing:128', dims=128, max_tokens=256), pathlib.Path('.'))\n"
        "print(m.fingerprint, hashlib.sha256(m.encode_documents(['Straße, naïve; foo_bar(1)']).tobytes()).hexdigest())\n"
    )
    seen = {run(script, PYTHONHASHSEED=seed) for seed in ("1", "2")}
    assert len(seen) == 1
    assert seen.pop().split()[0] == loaded().fingerprint


@given(st.lists(WORDS, min_size=1, max_size=6))
def test_rows_belong_to_their_texts(texts):
    """Each row is the unit vector of the text at its place, whatever the others are."""
    model = loaded()
    rows = model.encode_documents(texts)
    assert rows.dtype == np.float32
    assert rows.shape == (len(texts), 128)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    alone = np.concatenate([model.encode_documents([text]) for text in texts])
    np.testing.assert_allclose(rows, alone, atol=1e-6)


def test_hashing_ranks_by_shared_words():
    """The passage that shares words, or parts of words, with the query comes first."""
    model = loaded()
    scores = model.encode_queries(["listing bucket objects"]) @ model.encode_documents(PASSAGES).T
    assert scores.argmax() == 0


def test_no_texts_give_no_rows():
    """An empty list is an empty (0, dims) array, not an error."""
    assert loaded().encode_queries([]).shape == (0, 128)


def test_text_without_a_vector_is_refused():
    """A text that yields no vector is a ModelError that shows it, never a row of NaN."""
    with pytest.raises(ModelError, match="no usable vector for text 1"):
        loaded().encode_documents(["fine", "   "])


def test_progress_counts_every_text():
    """The progress callback hears of each text once."""
    heard: list[int] = []
    loaded().encode_documents([f"text {number}" for number in range(600)], progress=heard.append)
    assert sum(heard) == 600
    assert len(heard) > 1


@pytest.mark.parametrize(
    "change",
    [{"query_prompt": "query: "}, {"document_prompt": "passage: "}, {"max_tokens": 100}, {"source": "hashing:64", "dims": 64}],
    ids=lambda change: next(iter(change)),
)
def test_fingerprint_follows_what_shapes_vectors(change):
    """A change of prompt, length limit or dimensions changes the fingerprint."""
    assert loaded(**change).fingerprint != loaded().fingerprint


def test_fingerprint_ignores_the_name():
    """The same model under another name has the same fingerprint: its vectors can be shared."""
    assert loaded(name="another").fingerprint == loaded().fingerprint


def test_prompts_reach_the_right_side():
    """The query prompt changes query vectors only, the document prompt document vectors only."""
    plain, prompted = loaded(), loaded(query_prompt="query: ")
    texts = ["some text"]
    np.testing.assert_array_equal(plain.encode_documents(texts), prompted.encode_documents(texts))
    np.testing.assert_array_equal(plain.encode_documents(["query: some text"]), prompted.encode_queries(texts))


@pytest.mark.parametrize("source", ["hashing:64", "hashing:x"])
def test_wrong_dims_are_refused(source):
    """A model that does not give the configured vector length is refused when it is loaded."""
    with pytest.raises(ModelError, match=r"ragline\.toml says 128"):
        loaded(source=source)


def test_minilm_knows_meaning(minilm):
    """MiniLM finds the passage that means the same with other words, with unit float32 vectors of 384."""
    rows = minilm.encode_documents(PASSAGES)
    assert rows.shape == (3, 384)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    scores = minilm.encode_queries(["I cannot log in because I forgot my secret word"]) @ rows.T
    assert scores.argmax() == 2


def test_minilm_batches_keep_order(minilm):
    """Texts of very different length come back at their own places."""
    texts = ["short", "a much longer text " * 30, "middle sized text here", "x"]
    together = minilm.encode_documents(texts)
    alone = np.concatenate([minilm.encode_documents([text]) for text in texts])
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_minilm_cuts_at_max_tokens(minilm):
    """What lies beyond max_tokens does not change the vector, and counting is not cut."""
    start = "word " * 300
    assert minilm.count_tokens([start]) == [300]
    np.testing.assert_allclose(minilm.encode_documents([start]), minilm.encode_documents([start + "entirely other matter"]), atol=1e-6)


def test_models_differ(minilm, wordllama):
    """Two models never share a fingerprint, and fingerprints are stable over loads."""
    assert minilm.fingerprint != wordllama.fingerprint
    assert loaded(WORDLLAMA).fingerprint == wordllama.fingerprint
    assert loaded(WORDLLAMA, query_prompt="query: ").fingerprint != wordllama.fingerprint


def test_wordllama_cuts_and_counts(wordllama):
    """The static model obeys max_tokens as well, and says how many tokens a text has."""
    start = "word " * 600
    assert wordllama.count_tokens([start])[0] >= 600
    np.testing.assert_allclose(wordllama.encode_documents([start]), wordllama.encode_documents([start + "other matter"]), atol=1e-6)
    scores = wordllama.encode_queries(["list bucket objects"]) @ wordllama.encode_documents(PASSAGES).T
    assert scores.argmax() == 0


def test_loading_is_quiet(capfd):
    """Loading and encoding print nothing: no load report, no progress bar."""
    model = loaded(MINILM)
    model.encode_documents(PASSAGES)
    assert capfd.readouterr() == ("", "")


def test_bfloat16_is_another_model_in_name_and_the_same_in_effect(minilm):
    """bfloat16 vectors agree with float32 (mean cosine >= .999) and carry a fingerprint of their own."""
    half = loaded(MINILM, dtype="bfloat16")
    assert half.dtype == "bfloat16"
    assert half.fingerprint != minilm.fingerprint
    rows = half.encode_documents(PASSAGES)
    assert rows.dtype == np.float32
    assert (rows * minilm.encode_documents(PASSAGES)).sum(axis=1).mean() >= 0.999


def test_too_many_tokens_are_refused():
    """A max_tokens that the architecture cannot take is refused when the model is loaded."""
    with pytest.raises(ModelError, match="takes 512 tokens"):
        loaded(MINILM, max_tokens=1024)


def test_flipped_byte_is_refused(tmp_path, wordllama):
    """One flipped byte in a model folder is found before the model is used."""
    folder = weights.pull(WORDLLAMA.source, MODELS_DIR, progress=lambda _: None)
    copy = tmp_path / folder.name
    shutil.copytree(folder, copy)
    with (copy / "model.safetensors").open("r+b") as stream:
        stream.seek(20_000_000)
        byte = stream.read(1)
        stream.seek(20_000_000)
        stream.write(bytes([byte[0] ^ 1]))
    with pytest.raises(ModelError, match="damaged"):
        load_model(WORDLLAMA, tmp_path)


def test_changed_weights_change_the_fingerprint(tmp_path, wordllama):
    """The fingerprint is of the weights in memory: a path: folder that differs in one number is another model."""
    from safetensors.numpy import load_file, save_file

    folder = weights.pull(WORDLLAMA.source, MODELS_DIR, progress=lambda _: None)
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    (copy / "MANIFEST.json").unlink()
    assert loaded(WORDLLAMA, source=f"path:{copy}").fingerprint == wordllama.fingerprint
    table = dict(load_file(copy / "model.safetensors"))
    table["embedding.weight"][31999, 255] += 1
    save_file(table, copy / "model.safetensors")
    assert loaded(WORDLLAMA, source=f"path:{copy}").fingerprint != wordllama.fingerprint


def test_unloadable_folder_is_a_model_error(tmp_path):
    """A folder of safetensors that is no model gives a ModelError that names it."""
    (tmp_path / "model.safetensors").write_bytes(b"not tensors")
    (tmp_path / "modules.json").write_text("[]")
    with pytest.raises(ModelError, match="cannot be loaded"):
        loaded(WORDLLAMA, source=f"path:{tmp_path}")


def test_threads_follow_the_environment(monkeypatch):
    """OMP_NUM_THREADS rules; without it the number is that of usable physical cores."""
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert thread_count() == 3
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert 1 <= thread_count() <= (os.cpu_count() or 1)
