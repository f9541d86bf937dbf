"""Writing the token vectors of a snapshot, for late interaction: what another snapshot of the same model holds is copied, the rest computed.

The axes are the principal ones of the tokens of a sample of chunks, without centring, since cosines are what counts. They are settled once for
a model in a store: a snapshot takes those of the one it copies from.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa

from rag_assets.survey import Rows, Survey
from rag_serving.embedding.tokens import RULE
from rag_serving.errors import SnapshotError
from rag_serving.passages import embedded_text
from rag_serving.ranking.maxsim import AXES, FOLDER, Integers, Keys, TokenVectors, Vectors, packed, passage_keys, unit_rows
from rag_serving.snapshots import manifests, snapshot_key, verify
from rag_serving.store import Store

MOST_AXES = 128
_TOGETHER = 512
TokenEncoding = Callable[[Sequence[str]], list[Vectors]]


@dataclass(frozen=True, slots=True)
class Written:
    """What the token vectors of a snapshot amount to; `computed` of its passages were encoded for it."""

    vectors: int
    dims: int
    bytes: int
    computed: int


def store_tokens(store: Store, folder: Path, rows: Rows, found: Survey, fingerprint: str) -> dict[str, Any]:
    """Give every chunk of a snapshot in the making its token vectors; what the manifest says of them."""
    if rows.tokens is None:
        return {}
    known = None if (folder / FOLDER).exists() else _known(store, fingerprint)
    written = write_tokens(folder, map(_texts, rows.batches()), rows.tokens, sample=_texts(found.sample), known=known)
    return {"kept": RULE, "vectors": written.vectors, "dims": written.dims, "bytes": written.bytes}


def _texts(batch: pa.RecordBatch) -> list[str]:
    return [embedded_text(title, text) for title, text in zip(batch["title"].to_pylist(), batch["text"].to_pylist(), strict=True)]


def _known(store: Store, fingerprint: str) -> TokenVectors | None:
    """The token vectors of the newest sound snapshot of this model that has them by the present rule."""
    alike = [each for each in manifests(store) if each.fingerprint == fingerprint and each.rerank.get("tokens", {}).get("kept") == RULE]
    for manifest in sorted(alike, key=lambda each: each.built_at, reverse=True):
        with suppress(SnapshotError):
            verify(store, manifest.snapshot_id)
            return TokenVectors(store.folder(snapshot_key(manifest.snapshot_id)))
    return None


def write_tokens(
    folder: Path,
    batches: Iterable[Sequence[str]],
    encode: TokenEncoding,
    *,
    sample: Sequence[str],
    known: TokenVectors | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Written:
    """Give the snapshot in `folder` the token vectors of these embedded texts that it does not have from its parent.

    `encode` gives float32 (tokens, dims) of unit norm for each text. `known` is copied from; `progress` hears how many texts were computed.
    """
    root = folder / FOLDER
    held = TokenVectors(folder) if root.exists() else None
    root.mkdir(exist_ok=True)
    source = held or known
    axes = source.axes if source else principal_axes(encode(sample), most=MOST_AXES)
    if held is None:
        np.save(root / AXES, axes)
    computed = 0
    with _Segment(root / f"{sum(each.is_dir() for each in root.iterdir()):03d}") as segment:
        for batch in batches:
            for start in range(0, len(batch), _TOGETHER):
                new = segment.unseen(batch[start : start + _TOGETHER], held)
                keys = passage_keys(new)
                copied = known.holds(keys) if known else np.zeros(len(keys), dtype=bool)
                if known:
                    segment.add(keys[copied], known.read(keys[copied]))
                absent = [new[at] for at in np.flatnonzero(~copied)]
                segment.add(keys[~copied], [packed(unit_rows(rows @ axes)) for rows in encode(absent)] if absent else [])
                computed += len(absent)
                progress(computed)
    return _amount(folder, computed)


def principal_axes(tokens: Sequence[Vectors], *, most: int) -> Vectors:
    """Orthonormal columns, float32 (dims, min(dims, most)), that keep most of the square length of these vectors; of fixed sign."""
    rows = np.concatenate(list(tokens)).astype(np.float64)
    _, axes = np.linalg.eigh(rows.T @ rows)
    axes = axes[:, ::-1][:, :most]
    signs = np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])])
    kept: Vectors = np.ascontiguousarray(axes * signs, dtype=np.float32)
    return kept


def _amount(folder: Path, computed: int) -> Written:
    written = TokenVectors(folder)
    size = sum(path.stat().st_size for path in (folder / FOLDER).rglob("*") if path.is_file())
    return Written(written.vectors, written.axes.shape[1], size, computed)


class _Segment:
    """A segment as it is written, passage after passage; without any, it leaves nothing."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = ExitStack()
        self._keys: list[bytes] = []
        self._seen: set[bytes] = set()
        self._ends = [0]

    def __enter__(self) -> Self:
        self._folder.mkdir()
        self._vectors, self._scales = (self._files.enter_context((self._folder / name).open("xb")) for name in ("vectors.i8", "scales.f4"))
        return self

    def unseen(self, texts: Sequence[str], held: TokenVectors | None) -> list[str]:
        """The texts that neither this segment nor an earlier one has, each once."""
        distinct = list(dict.fromkeys(texts))
        keys = passage_keys(distinct)
        there = held.holds(keys) if held else np.zeros(len(keys), dtype=bool)
        return [text for text, key, known in zip(distinct, keys.tolist(), there, strict=True) if not known and key not in self._seen]

    def add(self, keys: Keys, passages: Sequence[tuple[Integers, Vectors]]) -> None:
        for key, (vectors, scales) in zip(keys.tolist(), passages, strict=True):
            self._vectors.write(np.ascontiguousarray(vectors).tobytes())
            self._scales.write(np.ascontiguousarray(scales, dtype="<f4").tobytes())
            self._keys.append(key)
            self._seen.add(key)
            self._ends.append(self._ends[-1] + len(scales))

    def __exit__(self, *_: object) -> None:
        self._files.close()
        if self._keys:
            keys = np.array(self._keys, dtype="S16")
            order = np.argsort(keys)
            np.save(self._folder / "keys.npy", keys[order])
            np.save(self._folder / "places.npy", np.array([self._ends[:-1], self._ends[1:]], dtype=np.int64).T[order])
        else:
            for path in self._folder.iterdir():
                path.unlink()
            self._folder.rmdir()
