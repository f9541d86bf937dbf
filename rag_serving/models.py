"""Embedding models: a row of `ragline.toml` becomes something that embeds, with a fingerprint of what was really loaded.

The embedding service and the pipeline load models through here alike, so the same row gives the same fingerprint in both. torch is imported
only when a model that needs it is loaded; `hashing:DIMS` needs neither torch nor weights.
"""

import hashlib
import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from rag_serving.embedding import hashing, weights
from rag_serving.embedding.cpu import thread_count
from rag_serving.embedding.onnx import OnnxEncoder, graph_of
from rag_serving.embedding.pytorch import TorchEncoder
from rag_serving.embedding.tokens import TokenEncoding, hashing_tokens
from rag_serving.errors import ModelError
from rag_serving.ranking.maxsim import unit_rows
from rag_serving.settings import ModelSpec

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Vectors = npt.NDArray[np.float32]
Dtype = Literal["float32", "bfloat16", "int8"]


class UnusableText(ModelError):
    """The model works, and makes nothing of this text."""


@dataclass(frozen=True, kw_only=True)
class EmbeddingModel:
    """A loaded model. Vectors are float32 of unit length, (n, dims), in input order.

    `fingerprint` is 64 hex digits over weights, tokenizer, module configuration, prompts, normalisation, dims, max_tokens and the dtype in
    use. `tokenizer` neither truncates nor pads: it is for sizing chunks. Safe to call from several threads.
    Queries are computed in each of them where `packed` is there; all else takes turns, each on all cores.
    """

    spec: ModelSpec
    fingerprint: str
    dims: int
    dtype: Dtype
    tokenizer: "Tokenizer"
    batch_size: int
    raw: Callable[[Sequence[str]], Vectors] = field(repr=False)
    packed: Callable[[Sequence[str]], Vectors] | None = field(default=None, repr=False)
    """A quicker way to the same vectors for short texts, where the architecture has one."""
    tokens: TokenEncoding | None = field(default=None, repr=False)
    """The vectors of each text's tokens, where the architecture has them; for late interaction."""
    _turn: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False, init=False)

    def encode_queries(self, texts: Sequence[str]) -> Vectors:
        """Vectors of queries, with the query prompt. ModelError when a text gives no usable vector."""
        prompted = [self.spec.query_prompt + text for text in texts]
        if self.packed is None or not texts:
            return self._encode(prompted, progress=None)
        return self._checked(self.packed(prompted), prompted)

    def encode_documents(self, texts: Sequence[str], *, progress: Callable[[int], None] | None = None) -> Vectors:
        """Vectors of passages, with the document prompt; `progress` hears how many more texts are done after each batch."""
        return self._encode([self.spec.document_prompt + text for text in texts], progress=progress)

    def encode_tokens(self, texts: Sequence[str], *, query: bool) -> list[Vectors]:
        """The vectors of each text's tokens, float32 (tokens, dims) of unit norm, with the query or the document prompt.

        Safe beside the other methods in another thread. ModelError when the model has none.
        """
        if self.tokens is None:
            raise ModelError(f"{self.spec.name} has no token vectors.", fix='Set rerank.method = "none", or take another model.')
        prompt = self.spec.query_prompt if query else self.spec.document_prompt
        found = [unit_rows(rows) for rows in self.tokens([prompt + text for text in texts])]
        bad = next((at for at, rows in enumerate(found) if not np.isfinite(rows).all()), None)
        if bad is not None:
            raise ModelError(
                f"{self.spec.name} gives no usable token vectors for text {bad} of {_size(texts, bad)}.", fix="Check its weights."
            )
        return found

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text as given: no prompt, no special tokens, nothing cut off."""
        return [len(encoding.ids) for encoding in self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def _encode(self, texts: Sequence[str], *, progress: Callable[[int], None] | None) -> Vectors:
        rows = np.empty((len(texts), self.dims), dtype=np.float32)
        longest_first = sorted(range(len(texts)), key=lambda at: -len(texts[at]))
        for start in range(0, len(texts), self.batch_size):
            batch = longest_first[start : start + self.batch_size]
            with self._turn:
                rows[batch] = self.raw([texts[at] for at in batch])
            if progress is not None:
                progress(len(batch))
        return self._checked(rows, texts)

    def _checked(self, rows: Vectors, texts: Sequence[str]) -> Vectors:
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        unusable = np.flatnonzero(~np.isfinite(norms[:, 0]) | (norms[:, 0] < 1e-12))
        if unusable.size:
            kind = UnusableText if np.isfinite(norms).all() else ModelError
            raise kind(
                f"{self.spec.name} gives no usable vector for text {unusable[0]} of {_size(texts, unusable[0])}.",
                fix="Leave out empty texts; if the text is not empty, the weights are damaged.",
            )
        rows /= norms
        return rows


def _size(texts: Sequence[str], at: int) -> str:
    """What an error may say of a text: errors are logged, and texts are not."""
    return f"{len(texts)}, of {len(texts[at])} characters"


def load_model(spec: ModelSpec, models_dir: Path, *, progress: Callable[[str], None] = lambda _: None) -> EmbeddingModel:
    """Load one model, pulling its weights into `models_dir` when they are absent; no network once they are there.

    Raises ModelError: weights that cannot be had or do not match their hashes, a vector length that is not `spec.dims`, bfloat16 that
    departs from float32.
    """
    if spec.source.startswith("hashing:"):
        return _load_hashing(spec)
    folder = weights.pull(spec.source, models_dir, progress=progress)
    graph = graph_of(folder)
    try:
        return _load_onnx(spec, folder, graph) if graph else _load_folder(spec, folder)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError) as error:
        fix = f"Install ragline[{'onnx' if graph else 'embedder'}]; remove the folder if it is damaged."
        raise ModelError(f"{spec.name} cannot be loaded from {folder}: {error}.", fix=fix) from error


def _load_hashing(spec: ModelSpec) -> EmbeddingModel:
    from tokenizers import Tokenizer, models, pre_tokenizers

    size = spec.source.removeprefix("hashing:")
    _check_dims(spec, int(size) if size.isdecimal() else 0)
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))  # noqa: S106 - a token of text, not a secret
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()

    def raw(texts: Sequence[str]) -> Vectors:
        return hashing.embed(texts, dims=spec.dims, max_tokens=spec.max_tokens)

    fingerprint = _fingerprint(spec, "float32", {"parameters": hashing.PARAMETERS})
    return EmbeddingModel(
        spec=spec,
        fingerprint=fingerprint,
        dims=spec.dims,
        dtype="float32",
        tokenizer=tokenizer,
        batch_size=256,
        raw=raw,
        tokens=hashing_tokens(dims=spec.dims, max_tokens=spec.max_tokens),
    )


def _load_onnx(spec: ModelSpec, folder: Path, graph: Path) -> EmbeddingModel:
    encoder = OnnxEncoder(folder, graph, max_tokens=spec.max_tokens, threads=thread_count())
    _check_dims(spec, encoder.dims)
    if spec.dtype not in {"auto", encoder.dtype}:
        raise ModelError(f"{spec.name} was exported as {encoder.dtype}, ragline.toml says {spec.dtype}.", fix='Set dtype = "auto".')
    return EmbeddingModel(
        spec=spec,
        fingerprint=_fingerprint(spec, encoder.dtype, encoder.parts),
        dims=encoder.dims,
        dtype=encoder.dtype,
        tokenizer=encoder.tokenizer,
        batch_size=8,  # its padded batches are quickest short
        raw=encoder,
    )


def _load_folder(spec: ModelSpec, folder: Path) -> EmbeddingModel:
    encoder = TorchEncoder(spec, folder)
    _check_dims(spec, encoder.dims)
    return EmbeddingModel(
        spec=spec,
        fingerprint=_fingerprint(spec, encoder.dtype, encoder.parts),
        dims=encoder.dims,
        dtype=encoder.dtype,
        tokenizer=encoder.tokenizer,
        batch_size=encoder.batch_size,
        raw=encoder,
        packed=encoder.packed,
        tokens=encoder.tokens,
    )


def _fingerprint(spec: ModelSpec, dtype: Dtype, parts: dict[str, str]) -> str:
    identity = parts | {
        "query_prompt": spec.query_prompt,
        "document_prompt": spec.document_prompt,
        "normalisation": "l2 float32",
        "dims": str(spec.dims),
        "max_tokens": str(spec.max_tokens),
        "dtype": dtype,
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _check_dims(spec: ModelSpec, dims: int) -> None:
    if dims != spec.dims:
        raise ModelError(f"{spec.name} gives vectors of {dims} dimensions, ragline.toml says {spec.dims}.", fix=f"Set dims = {dims}.")
