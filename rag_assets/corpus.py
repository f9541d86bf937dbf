"""The corpus tables of the store: source files, documents and chunks, each written once and named by its content.

`corpus/<name>.json` points at the current table and records the hash of what it was made from, so that unchanged inputs are not read again.
"""

import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rag_serving.errors import StoreError
from rag_serving.store import Store


@dataclass(frozen=True, slots=True)
class Table:
    """A stored table: `sha256` of its file, `content_sha256` of its rows, `made_from` of everything that determines them."""

    name: str
    sha256: str
    content_sha256: str
    made_from: str
    rows: int
    reused: bool = False

    @property
    def key(self) -> str:
        return f"corpus/{self.name}-{self.sha256[:16]}.parquet"


def fingerprint_of(*parts: Any) -> str:
    """sha256 over the JSON of `parts`: the identity of a computation's inputs."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def derive(store: Store, name: str, *, made_from: str, rows: Callable[[], list[dict[str, Any]]], schema: pa.Schema) -> Table:
    """The table `name` made from `made_from`: the stored one when it is current, else `rows()` written durably."""
    current = current_table(store, name)
    if current and current.made_from == made_from and store.exists(current.key):
        return replace(current, reused=True)
    made = rows()
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(made, schema=schema), buffer, compression="zstd")
    data = buffer.getvalue()
    table = Table(name, hashlib.sha256(data).hexdigest(), fingerprint_of(made), made_from, len(made))
    store.write(table.key, data)
    pointer = asdict(table)
    pointer.pop("reused")
    store.write(f"corpus/{name}.json", json.dumps(pointer, indent=2).encode())
    return table


def current_table(store: Store, name: str) -> Table | None:
    """What `corpus/<name>.json` points at, or None before the first run."""
    key = f"corpus/{name}.json"
    if not store.exists(key):
        return None
    try:
        return Table(**json.loads(store.read(key)))
    except (ValueError, TypeError):
        raise StoreError(f"{key} cannot be read.", fix="Delete that file; the next run makes it again.") from None


def read_table(store: Store, name: str) -> tuple[Table, pa.Table]:
    """The current table `name` with its rows, verified; StoreError when it is absent or damaged."""
    table = current_table(store, name)
    if table is None:
        raise StoreError(f"there are no {name} in the store yet.", fix="Materialize them first: `ragline run`.")
    data = store.read(table.key)
    if hashlib.sha256(data).hexdigest() != table.sha256:
        raise StoreError(f"{table.key} is damaged.", fix="Delete that file; the next run makes it again.")
    return table, pq.read_table(io.BytesIO(data))


SOURCE_FILES = pa.schema([("uri", pa.string()), ("sha256", pa.string()), ("size", pa.int64())])
DOCUMENTS = pa.schema(
    [("doc_id", pa.string()), ("uri", pa.string()), ("title", pa.string()), ("text", pa.string()), ("metadata", pa.string())]
)
CHUNKS = pa.schema(
    [
        ("chunk_id", pa.string()),
        ("doc_id", pa.string()),
        ("uri", pa.string()),
        ("title", pa.string()),
        ("heading_path", pa.string()),
        ("text", pa.string()),
        ("start", pa.int64()),
        ("end", pa.int64()),
    ]
)
