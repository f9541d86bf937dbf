"""Rows that an earlier run left in the store: found by key, compared by version, taken over as they are."""

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, groupby
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rag_assets.corpus import Table, batches_of, read_part, whole_table
from rag_serving.store import Store

Positions = NDArray[np.int64]
Keys = NDArray[np.uint64]


def key_hashes(values: Sequence[str]) -> Keys:
    """64 bits of BLAKE2b of each value."""
    return np.array([int.from_bytes(hashlib.blake2b(value.encode(), digest_size=8).digest(), "little") for value in values], np.uint64)


def column_hashes(batches: Iterable[pa.RecordBatch], column: str) -> Keys:
    """`key_hashes` of a column, over all batches."""
    return np.concatenate([np.empty(0, np.uint64), *(key_hashes(batch[column].to_pylist()) for batch in batches)])


class StoredRows:
    """Rows of a table by position, reading a part at a time; quick when the positions asked for grow."""

    def __init__(self, store: Store, table: Table, *, columns: Sequence[str] | None = None) -> None:
        self._store = store
        self._table = table
        self._columns = columns
        self._starts = list(accumulate((part.rows for part in table.parts), initial=0))
        self._opened: tuple[int, pa.Table] | None = None

    def take(self, positions: Sequence[int]) -> list[dict[str, Any]]:
        """The rows at `positions`, in that order."""
        found: dict[int, dict[str, Any]] = {}
        for number, group in groupby(sorted(set(positions)), key=self._part_of):
            wanted = list(group)
            rows = self._part(number).take([position - self._starts[number] for position in wanted])
            found.update(zip(wanted, rows.to_pylist(), strict=True))
        return [found[position] for position in positions]

    def _part_of(self, position: int) -> int:
        return bisect_right(self._starts, position) - 1

    def _part(self, number: int) -> pa.Table:
        if self._opened is None or self._opened[0] != number:
            self._opened = None
            self._opened = number, read_part(self._store, self._table, self._table.parts[number], columns=self._columns)
        return self._opened[1]


class RowIndex:
    """Where each key of a table stands: 24 bytes a row in memory. Without a table nothing is found."""

    def __init__(self, store: Store, table: Table | None, *, key: str, version: str) -> None:
        keys, versions = [np.empty(0, np.uint64)], [np.empty(0, np.uint64)]
        for batch in batches_of(store, table, columns=[key, version]) if table else _nothing():
            keys.append(key_hashes(batch[key].to_pylist()))
            versions.append(key_hashes(batch[version].to_pylist()))
        self._order = np.argsort(np.concatenate(keys), kind="stable")
        self._keys = np.concatenate(keys)[self._order]
        self._versions = np.concatenate(versions)[self._order]

    def find(self, keys: Sequence[str], versions: Sequence[str]) -> tuple[Positions, NDArray[np.bool_]]:
        """The position of each key, -1 where there is none, and whether what stands there has that version."""
        if not self._keys.size:
            return np.full(len(keys), -1, np.int64), np.zeros(len(keys), np.bool_)
        wanted = key_hashes(keys)
        at = np.minimum(np.searchsorted(self._keys, wanted), self._keys.size - 1)
        known = self._keys[at] == wanted
        return np.where(known, self._order[at], -1), known & (self._versions[at] == key_hashes(versions))


class EarlierRows:
    """Rows of the table that is current now, to be taken over while the next one is written.

    A row is taken over when key and version are equal and the table has this `basis`. `removed` counts the rows whose keys were not asked
    for. A table with a missing part counts as none.
    """

    def __init__(self, store: Store, name: str, *, key: str, version: str, basis: str) -> None:
        table = whole_table(store, name)
        self._index = RowIndex(store, table, key=key, version=version)
        self._rows = StoredRows(store, table) if table and table.basis == basis else None
        self.removed = table.rows if table else 0

    def unchanged(self, keys: Sequence[str], versions: Sequence[str]) -> dict[int, dict[str, Any]]:
        """The rows that may be taken over, by place in `keys`."""
        positions, same = self._index.find(keys, versions)
        self.removed -= int((positions >= 0).sum())
        if self._rows is None:
            return {}
        places = np.flatnonzero(same)
        return dict(zip(places.tolist(), self._rows.take(positions[places].tolist()), strict=True))


def _nothing() -> Iterator[pa.RecordBatch]:
    return iter(())
