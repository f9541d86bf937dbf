"""A cross-encoder: a transformer that reads query and passage together and says how relevant the passage is.

It runs where torch may be: in the embedding service, which offers it as `/v1/rerank`, and in the pipeline, which measures with it.
"""

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from rag_serving.deadline import Deadline
from rag_serving.embedding import weights
from rag_serving.errors import ModelError, RerankError

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder as Model

_BATCH = 32


class CrossEncoder:
    """A loaded cross-encoder with one output, on one thread of its own. A judge: scores are 0 to 1, by a sigmoid unless its folder says else.

    `fingerprint` is a sha256 over its files.
    """

    kind = "cross_encoder"

    def __init__(self, model: "Model", fingerprint: str) -> None:
        self.fingerprint = fingerprint
        self._model = model
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="cross-encoder")

    @classmethod
    def load(cls, source: str, models_dir: Path, *, progress: Callable[[str], None] = lambda _: None) -> "CrossEncoder":
        """The model of `path:DIR` or `hub:owner/name@revision`, on the CPU in float32. Raises ModelError."""
        folder = weights.pull(source, models_dir, progress=progress)
        fix = "Give a folder that sentence_transformers.CrossEncoder saved, with one output."
        try:
            from sentence_transformers import CrossEncoder as Model

            model = Model(str(folder), device="cpu", local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError) as error:
            raise ModelError(f"no cross-encoder can be loaded from {source}: {error}.", fix=fix) from error
        if model.num_labels != 1:
            raise ModelError(f"{source} has {model.num_labels} outputs, a reranker needs one.", fix=fix)
        return cls(model, folder_fingerprint(folder))

    async def relevance(self, query: str, texts: Sequence[str], *, deadline: Deadline) -> npt.NDArray[np.float64]:
        """RerankError when the time ended before the model was free."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._in_time, query, list(texts), deadline)

    def _in_time(self, query: str, texts: list[str], deadline: Deadline) -> npt.NDArray[np.float64]:
        if deadline.expired:
            raise RerankError("the time for these passages ended before they were scored.", fix="Allow more time.")
        return self.scores(query, texts)

    def scores(self, query: str, texts: Sequence[str]) -> npt.NDArray[np.float64]:
        """The same on the calling thread, float64 (texts,). From one thread at a time."""
        pairs: Any = [(query, text) for text in texts]
        return np.asarray(self._model.predict(pairs, batch_size=_BATCH, show_progress_bar=False), dtype=np.float64)

    async def aclose(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)


def folder_fingerprint(folder: Path) -> str:
    """sha256 over the names and bytes of a model's weights, tokenizer and configuration."""
    digest = hashlib.sha256()
    for path in sorted(each for each in folder.rglob("*") if each.suffix in {".json", ".safetensors", ".txt", ".model"}):
        with path.open("rb") as file:
            digest.update(f"{path.relative_to(folder).as_posix()} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()
