"""The corpus tables of the store: write-once Parquet parts, and one pointer a table that says which are current.

`corpus/<name>/<sha256>.parquet` holds some rows and is named by its bytes; `corpus/<name>.json` lists the parts in order with what they were
made from. Only the pointer is ever replaced, in one step and last, so a run that stops half-way leaves the table as it was.
"""

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rag_serving.errors import StoreError
from rag_serving.store import Store

PART_ROWS = 20_000
PART_CHARACTERS = 16 << 20  # a part of long texts holds fewer rows, so that one always fits in memory


@dataclass(frozen=True, slots=True)
class Part:
    sha256: str
    rows: int


@dataclass(frozen=True, slots=True)
class Table:
    """A stored table. `content_sha256` is of its rows in order, whatever parts hold them; `columns` has the same for each column.

    `made_from` identifies everything that determines the rows, `basis` the part of it that is no row of another table: code, settings,
    address. Rows of an earlier table of equal basis may be taken over one by one.
    """

    name: str
    content_sha256: str
    columns: Mapping[str, str]
    made_from: str
    basis: str
    rows: int
    parts: tuple[Part, ...]
    reused: bool = field(default=False, compare=False)

    @property
    def keys(self) -> list[str]:
        return [self.key_of(part) for part in self.parts]

    def key_of(self, part: Part) -> str:
        return f"corpus/{self.name}/{part.sha256}.parquet"

    def content_of(self, *columns: str) -> str:
        """Identity of the rows as far as `columns` go."""
        return fingerprint_of({column: self.columns[column] for column in columns})


def fingerprint_of(*parts: Any) -> str:
    """sha256 over the JSON of `parts`: the identity of a computation's inputs."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


class TableWriter:
    """Writes a table row by row, holding one part in memory. Nothing is current before `finish`."""

    def __init__(self, store: Store, name: str, schema: pa.Schema) -> None:
        self._store = store
        self._name = name
        self._schema = schema
        self._buffer: list[Mapping[str, Any]] = []
        self._characters = 0
        self._parts: list[Part] = []
        self._hashes = {column: _ContentHash() for column in schema.names}

    def add(self, row: Mapping[str, Any]) -> None:
        self._buffer.append(row)
        self._characters += sum(len(value) for value in row.values() if isinstance(value, str))
        if len(self._buffer) >= PART_ROWS or self._characters >= PART_CHARACTERS:
            self._flush()

    def extend(self, rows: Iterable[Mapping[str, Any]]) -> None:
        for row in rows:
            self.add(row)

    def seal(self, *, made_from: str, basis: str = "") -> Table:
        """The table of what was added: all of it stored, nothing of it current."""
        if self._buffer or not self._parts:
            self._flush()
        columns = {column: content.hexdigest(self._schema.field(column).type) for column, content in self._hashes.items()}
        rows = sum(part.rows for part in self._parts)
        return Table(self._name, fingerprint_of(columns), columns, made_from, basis, rows, tuple(self._parts))

    def finish(self, *, made_from: str, basis: str = "") -> Table:
        """Make what was added the current table."""
        return publish(self._store, self.seal(made_from=made_from, basis=basis))

    def _flush(self) -> None:
        rows = pa.Table.from_pylist(self._buffer, schema=self._schema)
        for column, content in self._hashes.items():
            content.update(rows[column].combine_chunks())
        sink = io.BytesIO()
        pq.write_table(rows, sink, compression="zstd")
        data = sink.getvalue()
        part = Part(hashlib.sha256(data).hexdigest(), rows.num_rows)
        self._store.write(f"corpus/{self._name}/{part.sha256}.parquet", data)
        self._parts.append(part)
        self._buffer, self._characters = [], 0


def publish(store: Store, table: Table) -> Table:
    """Make a sealed table the current one of its name, in one step."""
    pointer = asdict(table)
    pointer.pop("reused")
    store.write(f"corpus/{table.name}.json", json.dumps(pointer, indent=2).encode())
    return table


class _ContentHash:
    """Content of a column given piece by piece: equal for equal values however they are cut into pieces."""

    def __init__(self) -> None:
        self._streams: dict[str, Any] = {}

    def update(self, values: pa.Array) -> None:
        for name, data in _streams_of(values):
            self._streams.setdefault(name, hashlib.sha256()).update(data)

    def hexdigest(self, kind: pa.DataType) -> str:
        return fingerprint_of(str(kind), {name: stream.hexdigest() for name, stream in self._streams.items()})


def _streams_of(values: pa.Array) -> Iterator[tuple[str, bytes]]:
    """What identifies the values: their lengths (-1 for null) and their bytes, as streams that may be concatenated."""
    if pa.types.is_list(values.type):
        yield "lengths", _lengths(pc.list_value_length(values))
        yield from ((f"items.{name}", data) for name, data in _streams_of(values.flatten()))
    elif pa.types.is_string(values.type) or pa.types.is_binary(values.type):
        yield "lengths", _lengths(pc.binary_length(values))
        filled = pc.fill_null(values, "" if pa.types.is_string(values.type) else b"")
        _, offsets, data = filled.buffers()
        ends = np.frombuffer(offsets, np.int32)[filled.offset : filled.offset + len(filled) + 1] if len(filled) else np.zeros(1, np.int32)
        yield "bytes", bytes(memoryview(data)[ends[0] : ends[-1]]) if data else b""
    else:
        yield "valid", pc.is_valid(values).to_numpy(zero_copy_only=False).tobytes()
        yield "bytes", pc.fill_null(values, 0).to_numpy(zero_copy_only=False).tobytes()


def _lengths(values: pa.Array) -> bytes:
    return bytes(pc.fill_null(values, -1).to_numpy(zero_copy_only=False).astype("<i8").tobytes())


def read_pointer(store: Store, key: str) -> dict[str, Any]:
    """What the small JSON file at `key` says, beside or of a table; StoreError when it is absent or damaged. The next run writes it again."""
    try:
        pointer = json.loads(store.read(key))
        if isinstance(pointer, dict):
            return pointer
    except ValueError:
        pass
    raise _unreadable(key)


def _unreadable(key: str) -> StoreError:
    return StoreError(f"{key} cannot be read.", fix="Delete that file; the next run makes it again.")


def current_table(store: Store, name: str) -> Table | None:
    """What `corpus/<name>.json` points at, or None before the first run."""
    key = f"corpus/{name}.json"
    if not store.exists(key):
        return None
    pointer = read_pointer(store, key)
    try:
        if "parts" not in pointer and "sha256" in pointer:
            return None  # one file a table, as written before tables had parts: made again
        return Table(**{**pointer, "parts": tuple(Part(**part) for part in pointer["parts"])})
    except (ValueError, TypeError, KeyError):
        raise _unreadable(key) from None


def whole_table(store: Store, name: str) -> Table | None:
    """The current table if none of its parts is missing."""
    table = current_table(store, name)
    return table if table and all(store.exists(key) for key in table.keys) else None


def unchanged_table(store: Store, name: str, *, made_from: str) -> Table | None:
    """The current table, marked as reused, if it is whole and was made from just this."""
    table = whole_table(store, name)
    return replace(table, reused=True) if table and table.made_from == made_from else None


def require_table(store: Store, name: str) -> Table:
    """The current table; StoreError before the first run."""
    table = current_table(store, name)
    if table is None:
        raise StoreError(f"the store has no table of {name} yet.", fix="Materialize them first: `ragline run`.")
    return table


def stale_parts(store: Store, *, idle_days: float) -> list[str]:
    """Parts that no pointer names and that were not written for so many days, as "table/file" under `corpus/`."""
    found = []
    for name in store.names("corpus"):
        if table := current_table(store, name) if "." not in name else None:
            current = {f"{part.sha256}.parquet" for part in table.parts}
            found += [f"{name}/{part}" for part in store.names(f"corpus/{name}") if part not in current]
    return [part for part in found if store.idle_days(f"corpus/{part}") > idle_days]


def read_part(store: Store, table: Table, part: Part, *, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of one part, verified; StoreError when it is absent or damaged."""
    return pq.read_table(_verified(store, table, part), columns=None if columns is None else list(columns))


def table_batches(store: Store, name: str, *, columns: Sequence[str] | None = None, batch_rows: int = 8192) -> Iterator[pa.RecordBatch]:
    """Rows of the current table in order, at most `batch_rows` at a time; one part is in memory at once.

    Every part is verified before its first row is given. StoreError when the table is absent, or a part is absent or damaged.
    """
    yield from batches_of(store, require_table(store, name), columns=columns, batch_rows=batch_rows)


def batches_of(store: Store, table: Table, *, columns: Sequence[str] | None = None, batch_rows: int = 8192) -> Iterator[pa.RecordBatch]:
    """The same of a table that need not be current any more."""
    for part in table.parts:
        file = pq.ParquetFile(_verified(store, table, part))
        yield from file.iter_batches(batch_size=batch_rows, columns=None if columns is None else list(columns))


def read_table(store: Store, name: str) -> tuple[Table, pa.Table]:
    """The current table with all its rows, verified; for what fits in memory, `table_batches` for the rest."""
    table = require_table(store, name)
    return table, pa.concat_tables([read_part(store, table, part) for part in table.parts])


def _verified(store: Store, table: Table, part: Part) -> io.BytesIO:
    key = table.key_of(part)
    data = store.read(key)
    if hashlib.sha256(data).hexdigest() != part.sha256:
        raise StoreError(f"{key} is damaged.", fix="Delete that file; the next run makes it again.")
    return io.BytesIO(data)


SOURCE_FILES = pa.schema([("uri", pa.string()), ("version", pa.string()), ("media", pa.string()), ("size", pa.int64())])
DOCUMENTS = pa.schema(
    [
        ("doc_id", pa.string()),
        ("uri", pa.string()),
        ("title", pa.string()),
        ("text", pa.string()),
        ("metadata", pa.string()),
        ("acl", pa.list_(pa.string())),
        ("item", pa.string()),
        ("version", pa.string()),
        ("content", pa.string()),
    ]
)
QUARANTINE = pa.schema([("item", pa.string()), ("version", pa.string()), ("reason", pa.string()), ("detail", pa.string())])
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
CUTS = pa.schema(
    [("doc_id", pa.string()), ("content", pa.string()), ("chunks", pa.int64()), ("truncated", pa.int64()), ("alias_of", pa.string())]
)
