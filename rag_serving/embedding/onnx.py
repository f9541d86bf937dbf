"""Embedding models as ONNX graphs, run by ONNX Runtime: no torch in the process, and int8 weights where a model ships them.

A folder holds `model.onnx` (with external data beside it, if any) at its root or in `onnx/`, `tokenizer.json`, and sentence-transformers'
`1_Pooling/config.json`. The graph takes token ids and an attention mask and gives the last hidden state.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from rag_serving.errors import ModelError

Vectors = npt.NDArray[np.float32]

_PLACES = ("model.onnx", "onnx/model.onnx")
_GRAPH, _INITIALIZER, _DIMS, _DATA_TYPE = 7, 5, 1, 2  # fields of ModelProto, GraphProto and TensorProto (onnx.proto)
_BYTES = frozenset({2, 3})  # TensorProto.DataType: UINT8, INT8


def graph_of(folder: Path) -> Path | None:
    """The ONNX graph of a model folder."""
    return next((folder / place for place in _PLACES if (folder / place).is_file()), None)


class OnnxEncoder:
    """Texts to vectors (n, dims), not normalised. `parts` are digests of what was loaded. Safe to call from one thread at a time.

    Raises ModelError: a graph of another shape, pooling other than mean or CLS, an input length that the graph does not take.
    """

    def __init__(self, folder: Path, graph: Path, *, max_tokens: int, threads: int) -> None:
        import onnxruntime
        from tokenizers import Tokenizer

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the runtime's own errors have no base but this
            raise ModelError(f"{graph} is no ONNX graph that can be run: {error}.", fix="Export the model again.") from error
        self._inputs = {given.name for given in self._session.get_inputs()}
        output = self._session.get_outputs()[0]
        known = {"input_ids", "attention_mask", "token_type_ids"}
        if not {"input_ids", "attention_mask"} <= self._inputs <= known or len(output.shape) != 3:
            raise ModelError(
                f"{graph.name} takes {sorted(self._inputs)} and gives {output.name} of {len(output.shape)} dimensions.",
                fix="Export the encoder with input_ids, attention_mask and last_hidden_state.",
            )
        self._output = output.name
        self._cls, pooling = _pooling(folder / "1_Pooling" / "config.json")
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(max_tokens)
        self.tokenizer: Tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.dtype = _dtype(graph.read_bytes())
        self.parts = {
            "weights": _digest(graph, *sorted(graph.parent.glob(f"{graph.name}?*"))),
            "tokenizer": hashlib.sha256(self.tokenizer.to_str().encode()).hexdigest(),
            "configuration": json.dumps({"runtime": "onnx", "pooling": pooling}),
        }
        self.dims = self._tried(max_tokens).shape[1]

    def __call__(self, texts: Sequence[str]) -> Vectors:
        tokens = [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts))]
        ids = np.zeros((len(tokens), max(map(len, tokens))), dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, numbers in enumerate(tokens):
            ids[row, : len(numbers)] = numbers
            mask[row, : len(numbers)] = 1
        feed = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        (state,) = self._session.run([self._output], {name: values for name, values in feed.items() if name in self._inputs})
        if self._cls:
            return np.asarray(state[:, 0], dtype=np.float32)
        weights = mask[..., None].astype(np.float32)
        return np.asarray((state * weights).sum(axis=1) / weights.sum(axis=1), dtype=np.float32)

    def _tried(self, max_tokens: int) -> Vectors:
        """The vector of a text of the full length: an input that is too long fails here and not in a request."""
        try:
            return self(["a " * max_tokens])
        except Exception as error:
            raise ModelError(f"the ONNX graph does not take {max_tokens} tokens: {error}.", fix="Lower max_tokens.") from error


def _pooling(path: Path) -> tuple[bool, str]:
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    modes = [config["pooling_mode"]] if "pooling_mode" in config else [name for name, on in config.items() if on is True]
    mode = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}.get(modes[0], modes[0]) if len(modes) == 1 else ""
    if mode not in {"mean", "cls"}:
        raise ModelError(f"pooling {modes} is not supported with ONNX.", fix="Use a model with mean or CLS pooling.")
    return mode == "cls", mode


def _digest(*paths: Path) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _dtype(model: bytes) -> Literal["float32", "int8"]:
    """int8 when most of the weights are bytes, whether they are multiplied as such or widened first."""
    numbers = {True: 0, False: 0}
    for graph in _fields(model, _GRAPH):
        for tensor in _fields(graph, _INITIALIZER):
            dims = [size for field in _fields(tensor, _DIMS) for size in (_varints(field) if isinstance(field, bytes) else [field])]
            numbers[next(_fields(tensor, _DATA_TYPE), 0) in _BYTES] += math.prod(dims)
    return "int8" if numbers[True] > numbers[False] else "float32"


def _fields(message: Any, wanted: int) -> Iterator[Any]:
    """The values of one field of a protobuf message: bytes, or an int of a varint."""
    at = 0
    while at < len(message):
        value: Any
        key, at = _varint(message, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(message, at)
        else:
            size, at = _varint(message, at) if wire == 2 else ({1: 8, 5: 4}[wire], at)
            value, at = message[at : at + size] if number == wanted else None, at + size
        if number == wanted:
            yield value


def _varints(packed: bytes) -> Iterator[int]:
    at = 0
    while at < len(packed):
        value, at = _varint(packed, at)
        yield value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number in base 128 and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at
