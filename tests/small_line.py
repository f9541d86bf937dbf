"""A line in small: a hashed embedding model, a few dozen passages, and snapshots built from them by the code that builds the large ones."""

import asyncio
import hashlib
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pyarrow as pa

from rag_assets.attributes import attributes_of, row_schema
from rag_assets.freezing import Health
from rag_assets.indexing import build_snapshot
from rag_assets.recipe import Recipe
from rag_serving.models import load_model
from rag_serving.passages import embedded_text
from rag_serving.promotion import promote
from rag_serving.releases import Ledger
from rag_serving.settings import FilterKind, Gate, Index, ModelSpec, Retrieval
from rag_serving.snapshots import Manifest
from rag_serving.store import Store
from rag_serving.verdicts import COMPARING, GATES, RETRIEVAL_QUALITY, Verdict, write_verdict

SPEC = ModelSpec(name="hashing-64", source="hashing:64", dims=64, max_tokens=256)
MODEL = load_model(SPEC, Path())
GATE = Gate()


def passages(count: int, *, tag: str = "first") -> list[str]:
    return [f"{tag} passage {number} tells about topic{number % 7} and word{number}" for number in range(count)]


def chunk_table(
    texts: Sequence[str],
    *,
    title: str = "title {}",
    acl: Callable[[int], list[str]] = lambda _: [],
    metadata: Callable[[int], Mapping[str, Any]] = lambda _: {},
    filters: Mapping[str, FilterKind] = MappingProxyType({}),
) -> pa.Table:
    """A document of one chunk for each text; `acl` and `metadata` are called with its number."""
    rows = [
        {
            "chunk_id": hashlib.sha256(f"{number} {text}".encode()).hexdigest()[:32],
            "doc_id": f"d{number}",
            "uri": f"u{number}",
            "title": title.format(number),
            "heading_path": "",
            "text": text,
            "start": 0,
            "end": len(text),
            **attributes_of(acl(number), metadata(number), filters),
        }
        for number, text in enumerate(texts)
    ]
    return pa.Table.from_pylist(rows, schema=row_schema(filters))


def recipe_of(chunks: pa.Table, *, hnsw_from_rows: int = 2000, retrieval: Retrieval | None = None) -> Recipe:
    return Recipe(
        model=SPEC,
        fingerprint=MODEL.fingerprint,
        corpus_sha256=hashlib.sha256("\n".join(chunks["text"].to_pylist()).encode()).hexdigest(),
        documents=chunks.num_rows,
        chunking={"max_tokens": 240},
        index=Index(hnsw_from_rows=hnsw_from_rows),
        retrieval=retrieval or Retrieval(),
    )


def vectors_of(chunks: pa.Table) -> tuple[Any, Any]:
    titles, texts = chunks["title"].to_pylist(), chunks["text"].to_pylist()
    contents = [embedded_text(title, text) for title, text in zip(titles, texts, strict=True)]
    return MODEL.encode_documents(contents), MODEL.encode_documents(titles)


def build(store: Store, texts: Sequence[str], *, title: str = "title {}", **recipe: Any) -> tuple[Manifest, Health | None]:
    chunks = chunk_table(texts, title=title)
    return asyncio.run(build_snapshot(store, recipe_of(chunks, **recipe), chunks, *vectors_of(chunks), parent=None))


def verdict_of(store: Store, manifest: Manifest, **changes: Any) -> Verdict:
    """A fresh PASS against whatever is live now, with `changes`."""
    live = Ledger(store).state().champion
    fields: dict[str, Any] = {
        "gate": RETRIEVAL_QUALITY,
        "snapshot_id": manifest.snapshot_id,
        "manifest_sha256": manifest.sha256,
        "eval_set_sha256": "e" * 64,
        "champion": live.snapshot_id if live else None,
        "outcome": "PASS",
        "summary": "PASS: 0.900",
        "rules": ({"name": "mrr_floor", "passed": True, "observed": 0.9, "required": 0.8},),
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return Verdict(**{**fields, **changes})


def pass_gates(store: Store, manifest: Manifest, **changes: Any) -> None:
    """Fresh PASS verdicts of every gate, the warm-up one without a champion, each with `changes`."""
    for gate in GATES:
        alone: dict[str, Any] = {} if gate in COMPARING else {"champion": None}
        write_verdict(store, verdict_of(store, manifest, **{"gate": gate, **changes, **alone}))


def pass_and_promote(store: Store, manifest: Manifest, **changes: Any):
    pass_gates(store, manifest)
    return promote(store, manifest.snapshot_id, **{"gate": GATE, "actor": "tester", "reason": "better", **changes})


def days_ago(days: float) -> str:
    return (datetime.now(UTC) - timedelta(days=days)).isoformat(timespec="seconds")
