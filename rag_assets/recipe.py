"""What a snapshot is built by: the model, the chunking and the index settings, beside the rows themselves."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from rag_serving.settings import Index, ModelSpec, Retrieval

_CODE_VERSION = "snapshot-3"  # counts up when the same recipe and rows would give another snapshot
_REFINE = 2


@dataclass(frozen=True, slots=True)
class Recipe:
    """Every input of a build but the rows themselves; two builds of equal recipe and corpus give the same snapshot.

    `attributes_sha256` identifies what the rows have from their documents beside the text: access lists and filterable metadata.
    `rerank` is that of the manifest, without what is counted when it is built.
    """

    model: ModelSpec
    fingerprint: str
    corpus_sha256: str
    documents: int
    chunking: Mapping[str, Any]
    index: Index
    retrieval: Retrieval
    attributes_sha256: str = ""
    rerank: Mapping[str, Any] = field(default_factory=dict)

    @property
    def build_key(self) -> str:
        inputs = {
            "code": _CODE_VERSION,
            "lancedb": version("lancedb"),
            "fingerprint": self.fingerprint,
            "model": self.model.name,
            "corpus": self.corpus_sha256,
            "attributes": self.attributes_sha256,
            "chunking": dict(self.chunking),
            "index": self.searched_with,
            "retrieval": self.retrieval.model_dump(),
            "rerank": dict(self.rerank),
        }
        return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()

    @property
    def late_interaction(self) -> bool:
        """Whether token vectors are stored for reranking."""
        return bool(self.rerank) and self.rerank["rule"]["method"] == "maxsim"

    @property
    def searched_with(self) -> dict[str, Any]:
        """The index settings without those that only choose between a full and an incremental build."""
        return self.index.model_dump(exclude={"rebuild_share", "rebuild_after"})

    def index_of(self, rows: int) -> dict[str, Any]:
        """How the vectors of this many rows are indexed and searched."""
        indexed = rows >= self.index.hnsw_from_rows
        return {"vector_index": "IVF_HNSW_SQ" if indexed else None, "refine_factor": _REFINE, **self.searched_with}
