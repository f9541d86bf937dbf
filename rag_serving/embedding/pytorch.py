"""Embedding models as folders of sentence-transformers, run by torch on the CPU, in float32 or bfloat16.

torch is imported when a folder is loaded, and the network is off while it is.
"""

import hashlib
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from rag_serving.embedding.cpu import computes_bfloat16, thread_count
from rag_serving.embedding.packing import packed_encoder
from rag_serving.embedding.tokens import transformer_tokens
from rag_serving.errors import ModelError
from rag_serving.settings import ModelSpec

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from tokenizers import Tokenizer

Vectors = npt.NDArray[np.float32]
Dtype = Literal["float32", "bfloat16"]

PARITY_FLOOR = 0.999
PARITY_TEXTS = (
    "How do I list the objects of a bucket?",
    "The index is rebuilt when the chunker or the embedding model changes.",
    "Returns an iterator over the rows; raises ValueError if the limit is negative.",
    "Wie setze ich mein Passwort zurück?",
    "recall",
    "The quick brown fox jumps over the lazy dog, and nobody was in the least surprised by it. " * 6,
)


class TorchEncoder:
    """Texts to vectors (n, dims), not normalised. `parts` are digests of what was loaded. Safe to call from one thread at a time.

    `packed` is a quicker way to the same vectors for short texts, from several threads at once, and `tokens` gives those of each text's
    tokens, where the architecture has them. Raises ModelError: an input length that the model does not take, bfloat16 that departs from float32.
    """

    def __init__(self, spec: ModelSpec, folder: Path) -> None:
        # Threads that spin while they wait lose three quarters of the throughput as soon as another process wants a core; idle, it costs nothing.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        with _quiet_and_offline():
            import torch
            from sentence_transformers import SentenceTransformer

            self._threads = thread_count()
            torch.set_num_threads(self._threads)
            model = SentenceTransformer(
                str(folder), device="cpu", local_files_only=True, trust_remote_code=False, model_kwargs={"dtype": torch.float32}
            )
        model.eval()
        model.prompts, model.default_prompt_name = {}, None
        self._model = model
        self.dims = model.get_embedding_dimension() or 0
        static = type(model[0]).__name__ == "StaticEmbedding"
        self.batch_size = 1024 if static else 32
        self.tokenizer = _own_tokenizer(model[0])
        _limit_tokens(spec, model, static=static)
        self.dtype = _settle_dtype(spec, model, self, static=static)
        self.packed = packed_encoder(model)
        if self.packed is not None and _cosines(self.packed(PARITY_TEXTS), self(PARITY_TEXTS)).min() < PARITY_FLOOR:
            raise ModelError(
                f"{spec.name} gives other vectors without padding.", fix="Report the architecture: it is not the BERT it says."
            )
        self.parts = _loaded_parts(model, self.tokenizer, folder)
        self.tokens = transformer_tokens(model, self.tokenizer)

    def __call__(self, texts: Sequence[str]) -> Vectors:
        import torch

        torch.set_num_threads(self._threads)
        vectors = self._model.encode(list(texts), batch_size=len(texts), show_progress_bar=False, convert_to_numpy=True)
        return np.asarray(vectors, dtype=np.float32)


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
    full = raw(PARITY_TEXTS)
    model.to(torch.bfloat16)
    parity = float(_cosines(full, raw(PARITY_TEXTS)).mean())
    if parity >= PARITY_FLOOR:
        return "bfloat16"
    raise ModelError(
        f"{spec.name} in bfloat16 departs from float32: mean cosine {parity:.5f} < {PARITY_FLOOR}.", fix='Set dtype = "float32".'
    )


def _cosines(left: Vectors, right: Vectors) -> Vectors:
    """The cosine of each row of one with the same row of the other."""
    products: Vectors = (left * right).sum(axis=1) / np.linalg.norm(left, axis=1) / np.linalg.norm(right, axis=1)
    return products


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
