"""Late interaction: a passage is scored by its own token vectors, kept in the snapshot, against the query's.

MaxSim (Khattab and Zaharia 2020, "ColBERT"): each token of the query counts its best cosine among the tokens of the passage; the score is the
mean of these, -1 to 1, so it does not grow with the length of the query.

`tokens/` of a snapshot holds `axes.npy`, float32 (dims of the model, dims kept): both sides are turned onto these axes and brought back to
norm 1. `tokens/<number>/` is a segment; one vector is 8-bit integers times a scale of its own:
  vectors.i8   int8 (vectors, dims kept), token after token, passage after passage
  scales.f4    float32 (vectors,)
  keys.npy     16-byte digests of the passages' embedded texts, sorted
  places.npy   int64 (passages, 2): where the tokens of each begin and end
A later segment holds what an incremental build added, so the files of the parent stay as they are.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from rag_serving.errors import SnapshotError

Vectors = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int8]
Keys = npt.NDArray[np.bytes_]  # 16 bytes each
Scores = npt.NDArray[np.float64]

FOLDER = "tokens"
AXES = "axes.npy"
_LEVELS = 127


def unit_rows(vectors: Vectors) -> Vectors:
    """Each row divided by its length; a row of zeros stays one."""
    rows: Vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.float32(1e-12))
    return rows


def passage_keys(texts: Iterable[str]) -> Keys:
    """The keys under which the token vectors of embedded texts are kept."""
    digests = (hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest() for text in texts)
    return np.frombuffer(b"".join(digests), dtype="S16")


def packed(vectors: Vectors) -> tuple[Integers, Vectors]:
    """Vectors (n, dims) as 8-bit integers and the scale of each, float32 (n,): their products are the vectors within half a scale."""
    scales = np.maximum(np.abs(vectors).max(axis=1), np.float32(1e-12)) / np.float32(_LEVELS)
    return np.rint(vectors / scales[:, None]).astype(np.int8), scales.astype(np.float32)


def maxsim(query: Vectors, passages: Sequence[Vectors]) -> Scores:
    """The score of each passage, of token vectors (n, dims) each, for a query of token vectors (m, dims); all of unit norm."""
    return _best_of_each(query @ np.concatenate(list(passages)).T, [len(rows) for rows in passages])


def _best_of_each(cosines: Vectors, lengths: Sequence[int]) -> Scores:
    best: Scores = np.maximum.reduceat(cosines, np.cumsum([0, *lengths[:-1]]), axis=1).mean(axis=0, dtype=np.float64)
    return best


@dataclass(frozen=True)
class _Segment:
    folder: Path
    dims: int

    @cached_property
    def keys(self) -> Keys:
        keys: Keys = np.load(self.folder / "keys.npy", allow_pickle=False)
        return keys

    @cached_property
    def places(self) -> npt.NDArray[np.int64]:
        places: npt.NDArray[np.int64] = np.load(self.folder / "places.npy", allow_pickle=False)
        return places

    @cached_property
    def vectors(self) -> Integers:
        return np.memmap(self.folder / "vectors.i8", dtype=np.int8, mode="r").reshape(-1, self.dims)

    @cached_property
    def scales(self) -> Vectors:
        return np.memmap(self.folder / "scales.f4", dtype=np.float32, mode="r")

    @property
    def sound(self) -> bool:
        try:
            ends = int(self.places[:, 1].max())
            return len(self.keys) == len(self.places) and ends == len(self.scales) == len(self.vectors)
        except (OSError, ValueError, IndexError):
            return False

    def find(self, keys: Keys) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.bool_]]:
        at = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return at, self.keys[at] == keys


class TokenVectors:
    """The token vectors of a snapshot's passages, read from memory-mapped files; safe for several threads."""

    def __init__(self, folder: Path) -> None:
        """`folder` is the snapshot's. SnapshotError when it holds no token vectors, or not as they were written."""
        root = folder / FOLDER
        try:
            self.axes: Vectors = np.load(root / AXES, allow_pickle=False)
        except (OSError, ValueError):
            raise SnapshotError(f"{FOLDER}/{AXES} cannot be read.", fix="Restore the snapshot or build it again.") from None
        self._segments = [_Segment(each, self.axes.shape[1]) for each in sorted(root.iterdir(), reverse=True) if each.is_dir()]
        for segment in self._segments:
            if not segment.sound:
                raise SnapshotError(f"{FOLDER}/{segment.folder.name} cannot be read.", fix="Restore the snapshot or build it again.")

    @property
    def vectors(self) -> int:
        """How many there are."""
        return sum(len(segment.scales) for segment in self._segments)

    def holds(self, keys: Keys) -> npt.NDArray[np.bool_]:
        """Which of the passages have token vectors."""
        held = np.zeros(len(keys), dtype=bool)
        for segment in self._segments:
            held |= segment.find(keys)[1]
        return held

    def read(self, keys: Keys) -> list[tuple[Integers, Vectors]]:
        """The packed token vectors of passages, in order; SnapshotError when one has none."""
        found: dict[int, tuple[Integers, Vectors]] = {}
        for segment in self._segments:
            at, held = segment.find(keys)
            for number in np.flatnonzero(held).tolist():
                start, end = segment.places[at[number]]
                found.setdefault(number, (segment.vectors[start:end], segment.scales[start:end]))
        if len(found) < len(keys):
            raise SnapshotError(f"{len(keys) - len(found)} of {len(keys)} passages have no token vectors.", fix="Build it again.")
        return [found[number] for number in range(len(keys))]

    def scores(self, query: Vectors, texts: Sequence[str]) -> Scores:
        """MaxSim of the passages with these embedded texts; `query` holds the model's token vectors of it, float32 (m, dims of the model)."""
        passages = self.read(passage_keys(texts))
        if not passages:
            return np.empty(0)
        tokens = np.concatenate([vectors for vectors, _ in passages]).astype(np.float32)
        cosines = (unit_rows(query @ self.axes) @ tokens.T) * np.concatenate([scales for _, scales in passages])
        return _best_of_each(cosines, [len(scales) for _, scales in passages])
