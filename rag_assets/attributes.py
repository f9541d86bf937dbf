"""What chunks have from their documents in a snapshot: who may read them, and the metadata that requests may filter by.

The corpus keeps both beside the documents alone, so that a change of them cuts and embeds nothing; here they meet the chunks.
"""

import json
import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa

from rag_assets.corpus import CHUNKS, require_table, table_batches
from rag_serving.errors import StoreError
from rag_serving.filters import ACL_COLUMN, PUBLIC, access_marks, metadata_column
from rag_serving.settings import FilterKind
from rag_serving.store import Store

_TYPES: Mapping[FilterKind, pa.DataType] = {"text": pa.string(), "number": pa.float64(), "flag": pa.bool_()}
_FLAGS = {"true": True, "false": False}
_log = logging.getLogger("ragline")


def row_schema(filters: Mapping[str, FilterKind]) -> pa.Schema:
    """The columns of chunks with their attributes."""
    declared = [pa.field(metadata_column(key), _TYPES[kind]) for key, kind in filters.items()]
    return pa.schema([*CHUNKS, pa.field(ACL_COLUMN, pa.list_(pa.string())), *declared])


def attributes_of(acl: list[str], metadata: Mapping[str, Any], filters: Mapping[str, FilterKind]) -> dict[str, Any]:
    """The attribute columns of one document's chunks. A value that is not of the declared kind is left empty."""
    return {
        ACL_COLUMN: access_marks(acl) or [PUBLIC],
        **{metadata_column(key): value_of(metadata.get(key), filters[key]) for key in filters},
    }


def declared_of(metadata: str, filters: Mapping[str, FilterKind]) -> dict[str, Any]:
    """What stored metadata, a JSON object, says of the declared keys."""
    stored = json.loads(metadata or "{}") if filters else {}
    return {key: stored[key] for key in filters if key in stored}


def value_of(value: Any, kind: FilterKind) -> str | float | bool | None:
    """A metadata value as a column of that kind holds it; None for one that is not of the kind."""
    if value is None or kind == "text":
        return value if value is None or isinstance(value, str) else json.dumps(value)
    if kind == "flag":
        return value if isinstance(value, bool) else _FLAGS.get(str(value).lower())
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def attributed_chunks(store: Store, filters: Mapping[str, FilterKind]) -> Iterator[pa.RecordBatch]:
    """The chunks of the corpus in order, in batches of `row_schema`. Both tables stand in the order of the source, and pass by once.

    StoreError when a chunk's document is not there, because nobody knows who may read it.
    """
    documents = _Documents(store, filters)
    schema = row_schema(filters)
    for batch in table_batches(store, "chunks"):
        attributes = [documents.advance_to(doc_id) for doc_id in batch["doc_id"].to_pylist()]
        added = [pa.array([row[name] for row in attributes], schema.field(name).type) for name in schema.names[len(CHUNKS) :]]
        yield pa.record_batch([*(batch[name] for name in CHUNKS.names), *added], schema=schema)
    documents.report()


def attributes_sha256(store: Store, filters: Mapping[str, FilterKind]) -> str:
    """Identity of what `attributed_chunks` adds; it may change without the attributes of any chunk changing, never the other way round."""
    return require_table(store, "documents").content_of("doc_id", "acl", *(["metadata"] if filters else []))


class _Documents:
    """The attributes of documents, one after the other."""

    def __init__(self, store: Store, filters: Mapping[str, FilterKind]) -> None:
        self._filters = filters
        self._odd: Counter[str] = Counter()
        self._rows = (
            row for batch in table_batches(store, "documents", columns=["doc_id", "metadata", "acl"]) for row in batch.to_pylist()
        )
        self._doc_id: str | None = None
        self._attributes: dict[str, Any] = {}

    def advance_to(self, doc_id: str) -> dict[str, Any]:
        while self._doc_id != doc_id:
            row = next(self._rows, None)
            if row is None:
                raise StoreError(f"the document {doc_id!r} of a chunk is not where it was.", fix="Cut the chunks again: `ragline run`.")
            self._doc_id = row["doc_id"]
            if self._doc_id == doc_id:
                declared = declared_of(row["metadata"], self._filters)
                self._attributes = attributes_of(row["acl"] or [], declared, self._filters)
                self._odd.update(key for key in declared if self._attributes[metadata_column(key)] is None)
        return self._attributes

    def report(self) -> None:
        for key, count in self._odd.items():
            _log.warning("%d documents have a %s that is no %s: no filter on it finds them", count, key, self._filters[key])
