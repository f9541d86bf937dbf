"""The stored vectors of one embedding model: write-once segments, and an index that finds a text's vector in them.

`embeddings/<fingerprint>/<sha256>.arrow` holds (text key, vector) and is named by the hash of its bytes; `.parquet` segments are from earlier
versions and read alike.
"""

import hashlib
import io
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rag_serving.errors import AlreadyExists, StoreError
from rag_serving.snapshots import hash_file
from rag_serving.store import Store

Vectors = NDArray[np.float32]
Keys = NDArray[np.bytes_]  # 32 bytes each
MERGED_TEXTS = 16_384
MOST_SMALL_SEGMENTS = 64
_OPEN_SEGMENTS = 32
_LOOKS = 10


def text_keys(texts: Iterable[str]) -> Keys:
    """The keys under which the vectors of texts are kept: sha256, 32 bytes each."""
    return np.frombuffer(b"".join(hashlib.sha256(text.encode()).digest() for text in texts), dtype="S32")


class EmbeddingCache:
    """The vectors of one fingerprint in the store.

    In memory is an index of 40 bytes a text; vectors are read from memory-mapped segments, each verified by its hash before it gives the
    first one. Safe beside another process that adds or merges segments; for one thread.
    """

    def __init__(self, store: Store, fingerprint: str, dims: int) -> None:
        self._store = store
        self._prefix = f"embeddings/{fingerprint[:32]}"
        self._dims = dims
        self._opened: OrderedDict[str, Vectors] = OrderedDict()
        self._verified: set[str] = set()
        self.refresh()

    def refresh(self) -> None:
        """Look again at which segments there are."""
        for _ in range(_LOOKS):
            self._names = self._store.names(self._prefix)
            with suppress(FileNotFoundError):  # merged away by another process since it was named
                keys = [self._keys_of(name) for name in self._names]
                break
        else:
            raise StoreError(f"the segments of {self._prefix} change all the time.", fix="Run it again.")
        self._rows = dict(zip(self._names, (len(part) for part in keys), strict=True))
        places = [(np.int64(at) << 32) + np.arange(len(part)) for at, part in enumerate(keys)]
        self._keys, first = np.unique(np.concatenate(keys or [text_keys([])]), return_index=True)
        self._places = np.concatenate(places)[first] if places else np.empty(0, np.int64)

    def __len__(self) -> int:
        return len(self._keys)

    def holds(self, keys: Keys) -> NDArray[np.bool_]:
        """Which of the keys have a stored vector."""
        return self._find(keys)[1]

    def vectors(self, keys: Keys) -> Vectors:
        """The vectors of stored keys, in order; StoreError names a segment whose bytes are not what its name says, and a key that is absent."""
        try:
            return self._gather(keys)
        except FileNotFoundError:  # merged away by another process
            self.refresh()
        try:
            return self._gather(keys)
        except FileNotFoundError as error:
            raise StoreError(f"embedding segment {error.filename} vanished.", fix="Run it again.") from None

    def add(self, keys: Keys, vectors: Vectors) -> None:
        """Commit one segment; what is committed is never embedded again. It is found from the next `refresh` on."""
        self._write(keys, vectors)
        if sum(rows < MERGED_TEXTS for rows in self._rows.values()) >= MOST_SMALL_SEGMENTS:
            self._merge()

    def _write(self, keys: Keys, vectors: Vectors) -> str:
        stored_keys = pa.Array.from_buffers(pa.binary(32), len(keys), [None, pa.py_buffer(np.ascontiguousarray(keys))])
        stored = pa.record_batch({"key": stored_keys, "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), self._dims)})
        sink = io.BytesIO()
        with pa.ipc.new_file(sink, stored.schema) as file:
            file.write_batch(stored)
        name = f"{hashlib.sha256(sink.getbuffer()).hexdigest()}.arrow"
        with suppress(AlreadyExists):
            self._store.create(f"{self._prefix}/{name}", sink.getvalue())
        self._rows[name] = len(keys)
        return name

    def _merge(self) -> None:
        """Write small segments together as larger ones, then take them away: killed in between, both are there and hold the same."""
        group: list[str] = []
        small = [name for name, rows in self._rows.items() if rows < MERGED_TEXTS]
        for name in small:
            group.append(name)
            if sum(self._rows[each] for each in group) >= MERGED_TEXTS or name == small[-1]:
                with suppress(FileNotFoundError):  # another process merges the same
                    self._replace(group)
                group = []
        self.refresh()

    def _replace(self, group: list[str]) -> None:
        vectors = np.concatenate([self._open(name) for name in group])
        keys, first = np.unique(np.concatenate([self._keys_of(name) for name in group]), return_index=True)
        merged = self._write(keys, vectors[first])
        for name in group:
            if name != merged:
                self._store.remove(f"{self._prefix}/{name}")

    def _find(self, keys: Keys) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
        at = np.searchsorted(self._keys, keys)
        at[at == len(self._keys)] = 0
        return at, self._keys[at] == keys if len(self._keys) else np.zeros(len(keys), dtype=bool)

    def _gather(self, keys: Keys) -> Vectors:
        at, found = self._find(keys)
        if not found.all():
            raise StoreError(f"{int((~found).sum())} of {len(keys)} texts have no stored vector.", fix="Embed the corpus first.")
        places = self._places[at]
        segments, rows = places >> 32, places & 0xFFFFFFFF
        vectors = np.empty((len(keys), self._dims), dtype=np.float32)
        for segment in np.unique(segments):
            asked = segments == segment
            vectors[asked] = self._open(self._names[segment])[rows[asked]]
        return vectors

    def _keys_of(self, name: str) -> Keys:
        column = self._column(name, "key")
        return np.frombuffer(column.buffers()[1], dtype="S32", count=len(column), offset=column.offset * 32).copy()

    def _open(self, name: str) -> Vectors:
        """The vectors of a segment, (rows, dims), backed by its file."""
        if name not in self._opened:
            if name not in self._verified and hash_file(self._path(name)) != name.partition(".")[0]:
                raise self._damaged(name)
            self._verified.add(name)
            self._opened[name] = self._column(name, "vector").flatten().to_numpy().reshape(-1, self._dims)
        self._opened.move_to_end(name)
        while len(self._opened) > _OPEN_SEGMENTS:
            self._opened.popitem(last=False)
        return self._opened[name]

    def _column(self, name: str, column: str) -> pa.Array:
        try:
            if name.endswith(".parquet"):
                return pq.read_table(self._path(name), columns=[column])[column].combine_chunks()
            return pa.ipc.open_file(pa.memory_map(str(self._path(name)))).get_batch(0)[column]
        except FileNotFoundError:
            raise
        except (pa.ArrowException, OSError, KeyError):
            raise self._damaged(name) from None

    def _damaged(self, name: str) -> StoreError:
        return StoreError(f"embedding segment {self._prefix}/{name} is damaged.", fix="Delete that file; its texts are embedded again.")

    def _path(self, name: str) -> Path:
        return self._store.folder(self._prefix) / name
