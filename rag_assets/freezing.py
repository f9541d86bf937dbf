"""The checks that a new snapshot passes before it is sealed: its rows are the chunks, its indexes cover them, its vectors find themselves."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rag_assets.survey import Rows, Survey, Vectors, id_digests
from rag_serving.filters import ACL_COLUMN, condition, filterable
from rag_serving.retrieval import Retriever, open_table
from rag_serving.snapshots import Manifest

_NEAREST = 10
_SAME = 1e-5  # cosines that differ by less are equal but for rounding


@dataclass(frozen=True, slots=True)
class Coverage:
    """How the rows of a snapshot stand to the chunks: `lost` chunks have no row, `orphans` are rows without a chunk or a second time.

    `indexed_rows` counts by index, and is 0 for an index that should be there and is not.
    """

    rows: int
    lost: int
    orphans: int
    indexed_rows: Mapping[str, int]

    @property
    def indexed(self) -> bool:
        return all(count == self.rows for count in self.indexed_rows.values())

    @property
    def conserved(self) -> bool:
        return not (self.lost or self.orphans)

    @property
    def problems(self) -> list[str]:
        found = [f"{count} {name}" for name, count in (("chunks are lost", self.lost), ("rows are orphans", self.orphans)) if count]
        return found + [
            f"index {name} covers {count} of {self.rows} rows" for name, count in self.indexed_rows.items() if count != self.rows
        ]


@dataclass(frozen=True, slots=True)
class Health:
    """What the freeze checks measured; `problems` is empty for a snapshot that may be published.

    `ann_recall` is the share of the 10 nearest rows that searching as served finds, over 200 chunks; a row as near as the tenth counts.
    `restricted` counts the rows that not everyone may read, `closed` those that nobody may: they have lost their access list.
    """

    coverage: Coverage
    self_retrieval: float
    ann_recall: float
    restricted: int = 0
    closed: int = 0

    @property
    def problems(self) -> list[str]:
        found = self.coverage.problems
        if self.self_retrieval < 0.99:
            found.append(f"only {self.self_retrieval:.1%} of sampled chunks find themselves first")
        if self.closed:
            found.append(f"{self.closed} rows do not say who may read them")
        return found


async def cover(table: Any, manifest: Manifest, found: Survey) -> Coverage:
    """Compare the ids of an opened table with those of the chunks, and its indexes with its rows."""
    batches = await table.query().select(["chunk_id"]).to_batches()
    ids = np.concatenate([id_digests(batch) async for batch in batches] or [found.ids[:0]])
    distinct = np.unique(ids)
    shared = len(np.intersect1d(distinct, found.ids, assume_unique=True))
    columns = ["content", "title", ACL_COLUMN, *(column.name for column in filterable(manifest.index["filters"]).values())]
    columns += ["vector", "title_vector"] if manifest.index["vector_index"] else []
    indexed = dict.fromkeys((f"{column}_idx" for column in columns), 0)
    for index in await table.list_indices():
        indexed[index.name] = (await table.index_stats(index.name)).num_indexed_rows
    return Coverage(rows=len(ids), lost=found.rows - shared, orphans=len(ids) - shared, indexed_rows=indexed)


async def examine(folder: Path, manifest: Manifest, found: Survey, rows: Rows) -> Health:
    """Open the snapshot in `folder` as serving does, and measure it against the chunks and their vectors."""
    table = await open_table(folder)
    try:
        coverage = await cover(table, manifest, found)
        public = await table.count_rows(condition(None, {}, readable_by=frozenset()))
        closed = await table.count_rows(f"{ACL_COLUMN} IS NULL OR array_length({ACL_COLUMN}) = 0")
        vectors, _ = rows.vectors(found.sample)
        tenth = await _tenth_cosines(table, vectors)
        retriever = Retriever(manifest, table)
        recalls, themselves = [], 0
        for vector, least in zip(vectors, tenth, strict=True):
            cosines = np.array([hit.cosine for hit in await retriever.neighbours(vector, k=_NEAREST, exact=False)])
            recalls.append((cosines >= least - _SAME).sum() / min(_NEAREST, coverage.rows))
            themselves += bool(len(cosines) and cosines[0] > 1 - 1e-4)
    finally:
        table.close()
    shares = {"self_retrieval": float(themselves / len(vectors)), "ann_recall": float(np.mean(recalls))}
    return Health(coverage, **shares, restricted=coverage.rows - public - closed, closed=closed)


async def _tenth_cosines(table: Any, vectors: Vectors) -> Vectors:
    """For each vector the cosine of the tenth nearest row, or of the last one, by arithmetic over every row."""
    best: Vectors = np.empty((len(vectors), 0), dtype=np.float32)
    async for batch in await table.query().select(["vector"]).to_batches():
        stored = batch["vector"].flatten().to_numpy().reshape(-1, vectors.shape[1])
        best = np.hstack([best, vectors @ stored.T])
        if best.shape[1] > _NEAREST:
            best = np.partition(best, -_NEAREST, axis=1)[:, -_NEAREST:]
    least: Vectors = best.min(axis=1)
    return least
