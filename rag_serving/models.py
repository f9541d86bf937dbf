"""Embedding models: a row of `ragline.toml` becomes something that embeds, with a fingerprint of what was really loaded.

The embedding service and the pipeline load models through here alike, so the same row gives the same fingerprint in both. torch is imported
only when a model that needs it is loaded; `hashing:DIMS` needs neither torch nor weights.
"""

import hashlib
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from rag_serving.embedding import hashing, weights
from rag_serving.embedding.onnx import OnnxEncoder, graph_of
from rag_serving.embedding.packing import packed_encoder
from rag_serving.embedding.tokens import TokenEncoding, hashing_tokens, transformer_tokens
from rag_serving.errors import ModelError
from rag_serving.ranking.maxsim import unit_rows
from rag_serving.settings import ModelSpec

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from tokenizers import Tokenizer

Vectors = npt.NDArray[np.float32]
Dtype = Literal["float32", "bfloat16", "int8"]

PARITY_FLOOR = 0.999
_BF16_FLAGS = frozenset({"amx_bf16", "avx512_bf16"})  # measured: three times the throughput with the first, twice with the second
PARITY_TEXTS = (
    "How do I list the objects of a bucket?",
    "The index is rebuilt when the chunker or the embedding model changes.",
    "Returns an iterator over the rows; raises ValueError if the limit is negative.",
    "Wie setze ich mein Passwort zurück?",
    "recall",
    "The quick brown fox jumps over the lazy dog, and nobody was in the least surprised by it. " * 6,
)


class UnusableText(ModelError):
    """The model works, and makes nothing of this text."""


@dataclass(frozen=True, kw_only=True)
class EmbeddingModel:
    """A loaded model. Vectors are float32 of unit length, (n, dims), in input order.

    `fingerprint` is 64 hex digits over weights, tokenizer, module configuration, prompts, normalisation, dims, max_tokens and the dtype in
    use. `tokenizer` neither truncates nor pads: it is for sizing chunks. Safe to call from one thread at a time.
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
                f"{self.spec.name} gives no usable token vectors for text {bad}: {texts[bad][:60]!r}.", fix="Check its weights."
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
                f"{self.spec.name} gives no usable vector for text {unusable[0]}: {texts[unusable[0]][:60]!r}.",
                fix="Leave out empty texts; if the text is not empty, the weights are damaged.",
            )
        rows /= norms
        return rows


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
    # Threads that spin while they wait lose three quarters of the throughput as soon as another process wants a core; idle, it costs nothing.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with _quiet_and_offline():
        import torch
        from sentence_transformers import SentenceTransformer

        torch.set_num_threads(thread_count())
        model = SentenceTransformer(
            str(folder), device="cpu", local_files_only=True, trust_remote_code=False, model_kwargs={"dtype": torch.float32}
        )
    model.eval()
    model.prompts, model.default_prompt_name = {}, None
    _check_dims(spec, model.get_embedding_dimension() or 0)
    static = type(model[0]).__name__ == "StaticEmbedding"
    tokenizer = _own_tokenizer(model[0])
    _limit_tokens(spec, model, static=static)

    def raw(texts: Sequence[str]) -> Vectors:
        vectors = model.encode(list(texts), batch_size=len(texts), show_progress_bar=False, convert_to_numpy=True)
        return np.asarray(vectors, dtype=np.float32)

    dtype = _settle_dtype(spec, model, raw, static=static)
    packed = packed_encoder(model)
    if packed is not None and float((_unit(packed(PARITY_TEXTS)) * _unit(raw(PARITY_TEXTS))).sum(axis=1).min()) < PARITY_FLOOR:
        raise ModelError(f"{spec.name} gives other vectors without padding.", fix="Report the architecture: it is not the BERT it says.")
    fingerprint = _fingerprint(spec, dtype, _loaded_parts(model, tokenizer, folder))
    size = 1024 if static else 32
    return EmbeddingModel(
        spec=spec,
        fingerprint=fingerprint,
        dims=spec.dims,
        dtype=dtype,
        tokenizer=tokenizer,
        batch_size=size,
        raw=raw,
        packed=packed,
        tokens=transformer_tokens(model, tokenizer),
    )


def _own_tokenizer(first: Any) -> "Tokenizer":
    from tokenizers import Tokenizer

    loaded = first.tokenizer
    backend = loaded if isinstance(loaded, Tokenizer) else loaded.backend_tokenizer
    tokenizer = Tokenizer.from_str(backend.to_str())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _limit_tokens(spec: ModelSpec, model: "SentenceTransformer", *, static: bool) -> None:
    first: Any = model[0]
    if static:
        first.tokenizer.enable_truncation(spec.max_tokens)
        return
    config = first.auto_model.config
    # RoBERTa-like models start positions after the padding id, so their table is larger than the input by that id + 1
    offset = config.pad_token_id + 1 if config.model_type in {"mpnet", "roberta", "xlm-roberta", "camembert"} else 0
    positions = getattr(config, "max_position_embeddings", spec.max_tokens + offset) - offset
    if spec.max_tokens > positions:
        raise ModelError(f"{spec.name} takes {positions} tokens, max_tokens is {spec.max_tokens}.", fix=f"Set max_tokens <= {positions}.")
    model.max_seq_length = spec.max_tokens


def _settle_dtype(spec: ModelSpec, model: "SentenceTransformer", raw: Callable[[Sequence[str]], Vectors], *, static: bool) -> Dtype:
    """Turn the model to bfloat16 where asked and where its vectors stay those of float32; the dtype in use."""
    import torch

    wanted = spec.dtype
    if wanted == "auto":
        wanted = "bfloat16" if computes_bfloat16() and not static else "float32"
    if wanted == "float32":
        return "float32"
    full = _unit(raw(PARITY_TEXTS))
    model.to(torch.bfloat16)
    parity = float((full * _unit(raw(PARITY_TEXTS))).sum(axis=1).mean())
    if parity >= PARITY_FLOOR:
        return "bfloat16"
    raise ModelError(
        f"{spec.name} in bfloat16 departs from float32: mean cosine {parity:.5f} < {PARITY_FLOOR}.", fix='Set dtype = "float32".'
    )


def _unit(rows: Vectors) -> Vectors:
    unit: Vectors = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


def _loaded_parts(model: "SentenceTransformer", tokenizer: "Tokenizer", folder: Path) -> dict[str, str]:
    """Digests of what is in memory, and of the configuration files that said how to put it together."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy())
    modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    configuration: dict[str, Any] = {"modules": [[row["path"], row["type"].rpartition(".")[2]] for row in modules]}
    for row in modules:
        for path in sorted((folder / row["path"]).glob("*config.json")):
            if path.name not in {"tokenizer_config.json", "config_sentence_transformers.json", "data_config.json"}:
                configuration[path.relative_to(folder).as_posix()] = json.loads(path.read_text(encoding="utf-8"))
    return {
        "weights": digest.hexdigest(),
        "tokenizer": hashlib.sha256(tokenizer.to_str().encode()).hexdigest(),
        "configuration": json.dumps(configuration, sort_keys=True),
    }


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


@contextmanager
def _quiet_and_offline() -> Iterator[None]:
    """No network, no load report and no progress bars while libraries are imported and weights are read; the environment is put back."""
    quiet = {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
    }
    before = {name: os.environ.get(name) for name in quiet}
    os.environ.update(quiet)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from transformers.utils import logging as transformers_logging

            transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
            transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
            logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
            yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def computes_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware, so that `dtype = "auto"` uses it."""
    return bool(_BF16_FLAGS & _cpu_flags())


def thread_count() -> int:
    """OMP_NUM_THREADS when it is set, else the physical cores this process may use."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    pairs = zip(_cpu_lines("physical id"), _cpu_lines("core id"), strict=False)
    return max(1, min(usable, len(set(pairs)) or usable))


def _cpu_flags() -> frozenset[str]:
    return frozenset(next(iter(_cpu_lines("flags")), "").split())


def _cpu_lines(key: str) -> list[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return [line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key]
