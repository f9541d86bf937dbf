"""Building a snapshot: one LanceDB table with vector and full-text indexes, frozen by checks, sealed with a manifest, published once.

A snapshot is built in full, or from the newest like it: that one's files as hard links, the changed rows merged, the indexes extended.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rag_assets.attributes import row_schema
from rag_assets.corpus import CHUNKS
from rag_assets.freezing import Health, examine
from rag_assets.survey import Delta, Rows, Survey, Vectors, difference, survey
from rag_assets.token_vectors import store_tokens
from rag_serving.errors import SnapshotError
from rag_serving.filters import ACL_COLUMN, filterable
from rag_serving.passages import embedded_text
from rag_serving.retrieval import open_table
from rag_serving.settings import Index, ModelSpec, Retrieval
from rag_serving.snapshots import (
    TABLE,
    Manifest,
    check_inherited,
    find_by_build_key,
    hash_tree,
    link_files,
    manifests,
    seal,
    snapshot_key,
    verify,
)
from rag_serving.store import Store

_CODE_VERSION = "snapshot-3"
_REFINE = 2
_DELETE_TOGETHER = 10_000
_ANN_FLOOR = 0.95
_FOREVER = timedelta(days=36500)
_log = logging.getLogger("ragline")


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


@dataclass(frozen=True, slots=True)
class Increment:
    """What turns a parent's rows into the new ones."""

    parent: Manifest
    delta: Delta

    @property
    def counts(self) -> dict[str, int]:
        before = self.parent.delta
        return {
            "added": self.delta.added,
            "changed": self.delta.changed,
            "removed": self.delta.removed,
            "since_full": before.get("since_full", 0) + self.delta.rows,
            "generation": before.get("generation", 0) + bool(self.delta.rows),
        }


async def build_snapshot(
    store: Store,
    recipe: Recipe,
    chunks: pa.Table,
    vectors: Vectors,
    title_vectors: Vectors,
    *,
    parent: Manifest | None,
    tokens: Callable[[Sequence[str]], list[Vectors]] | None = None,
) -> tuple[Manifest, Health | None]:
    """`publish_snapshot` of what is in memory: a row a chunk, and vectors in the same order, float32 (rows, dims)."""
    for name, matrix in (("text", vectors), ("title", title_vectors)):
        _check_shape(name, matrix, rows=chunks.num_rows, dims=recipe.model.dims)
    at = {chunk_id: row for row, chunk_id in enumerate(chunks["chunk_id"].to_pylist())}

    def vectors_of(batch: pa.RecordBatch) -> tuple[Vectors, Vectors]:
        rows = [at[chunk_id] for chunk_id in batch["chunk_id"].to_pylist()]
        return vectors[rows], title_vectors[rows]

    return await publish_snapshot(store, recipe, Rows(chunks.to_batches, vectors_of, tokens), parent=parent)


async def publish_snapshot(store: Store, recipe: Recipe, rows: Rows, *, parent: Manifest | None) -> tuple[Manifest, Health | None]:
    """Publish the snapshot of these rows, or return the one that exists (then Health is None: nothing was built).

    With a parent, a small difference is merged into it; when the result is not sound, a full build follows. Rows pass by in batches.
    Raises SnapshotError, leaving the store as it was, when a freeze check fails.
    """
    existing = find_by_build_key(store, recipe.build_key)
    if existing:
        return existing, None
    found = survey(rows.batches())
    _check_attributes(found, recipe)
    if recipe.late_interaction and rows.tokens is None:
        raise SnapshotError("there are no token vectors to rerank with.", fix="Give the rows a model that has some.")
    if parent:
        try:
            increment = await increment_from(store, recipe, found, parent)
            if increment:
                return await _publish(store, recipe, rows, found, increment)
        except (SnapshotError, OSError, RuntimeError, ValueError) as error:  # the last three are LanceDB's
            _log.warning("building in full: %s cannot be gone on from: %s", parent.snapshot_id, error)
    return await _publish(store, recipe, rows, found, None)


def find_parent(store: Store, recipe: Recipe) -> Manifest | None:
    """The newest snapshot that this recipe can go on from: equal fingerprint, chunking, index structure and LanceDB version.

    Both have token vectors, or neither has. How it is searched (`ef`, the fusion) may differ, because only the manifest holds that.
    """

    def structure(fingerprint: str, chunking: Mapping[str, Any], index: Mapping[str, Any], tokens: bool, lancedb: str) -> tuple[Any, ...]:  # noqa: FBT001
        return fingerprint, dict(chunking), index["m"], index["ef_construction"], tokens, lancedb

    wanted = structure(recipe.fingerprint, recipe.chunking, recipe.searched_with, recipe.late_interaction, version("lancedb"))
    alike = (
        each
        for each in manifests(store)
        if structure(each.fingerprint, each.chunking, each.index, "tokens" in each.rerank, each.lancedb) == wanted
    )
    return max(alike, key=lambda manifest: manifest.built_at, default=None)


def affordable(recipe: Recipe, parent: Manifest, *, delta: int, rows: int) -> bool:
    """Whether `delta` changed rows are merged into the parent, to make `rows`, rather than built anew.

    Counted with all changes since the last full build they may be `index.rebuild_share` of the rows, and `index.rebuild_after` builds may
    follow a full one: each leaves dead rows, and one more part of every index to search.
    """
    if recipe.index_of(rows)["vector_index"] != parent.index["vector_index"]:
        return False
    since_full, generation = (parent.delta.get(name, 0) for name in ("since_full", "generation"))
    return delta == 0 or (since_full + delta <= recipe.index.rebuild_share * rows and generation < recipe.index.rebuild_after)


async def increment_from(store: Store, recipe: Recipe, found: Survey, parent: Manifest) -> Increment | None:
    """What to merge into the parent, which is verified and read for it; None when a full build is due."""
    if not affordable(recipe, parent, delta=abs(found.rows - parent.rows), rows=found.rows):
        return None
    verify(store, parent.snapshot_id)
    table = await open_table(store.folder(snapshot_key(parent.snapshot_id)))
    if not (await table.schema()).equals(_schema(found, recipe.model.dims)):
        return None
    columns = found.schema.names
    delta = await difference(found, await table.query().select(columns).to_batches())
    table.close()
    return Increment(parent, delta) if affordable(recipe, parent, delta=delta.rows, rows=found.rows) else None


async def _publish(store: Store, recipe: Recipe, rows: Rows, found: Survey, increment: Increment | None) -> tuple[Manifest, Health]:
    parent = store.folder(snapshot_key(increment.parent.snapshot_id)) if increment else None
    with store.staging("snapshots/build") as folder:
        if increment and parent:
            link_files(parent, folder)
            await _merge(folder, rows, found, increment.delta, dims=recipe.model.dims)
        else:
            await _write(folder, rows, found, recipe)
        stored = {"tokens": store_tokens(store, folder, rows, found, recipe.fingerprint)} if rows.tokens else {}
        manifest = Manifest(
            build_key=recipe.build_key,
            embedding_model=recipe.model.name,
            fingerprint=recipe.fingerprint,
            dims=recipe.model.dims,
            corpus_sha256=recipe.corpus_sha256,
            documents=recipe.documents,
            rows=found.rows,
            chunking=dict(recipe.chunking),
            index=recipe.index_of(found.rows),
            retrieval=recipe.retrieval.model_dump(),
            title_distinctness=found.title_distinctness,
            parent=increment.parent.snapshot_id if increment else None,
            lancedb=version("lancedb"),
            built_at=datetime.now(UTC).isoformat(timespec="microseconds"),
            files={},
            built="incremental" if increment else "full",
            delta=increment.counts if increment else {},
            rerank={**recipe.rerank, **stored},
        )
        health = await examine(folder, manifest, found, rows)
        problems = list(health.problems)
        if increment and health.ann_recall < _ANN_FLOOR:
            problems.append(f"approximate search finds {health.ann_recall:.1%} of the nearest chunks")
        if problems:
            raise SnapshotError(f"the new snapshot is not sound: {'; '.join(problems)}.", fix="Correct the rows or the index settings.")
        files = hash_tree(folder)
        if increment and parent:
            check_inherited(folder, files, parent, increment.parent)
        manifest = replace(manifest, files=files, restricted=health.restricted)
        seal(folder, manifest)
        store.publish(folder, snapshot_key(manifest.snapshot_id))
    return manifest, health


async def _write(folder: Path, rows: Rows, found: Survey, recipe: Recipe) -> None:
    import lancedb
    from lancedb.index import FTS, Bitmap, BTree, HnswSq, LabelList

    database = await lancedb.connect_async(folder)
    with _reader(rows.batches(), rows, found, dims=recipe.model.dims) as reader:
        table = await database.create_table(TABLE, reader)
    for column in ("content", "title"):
        await table.create_index(column, config=FTS(with_position=False))
    await table.create_index(ACL_COLUMN, config=LabelList())
    for each in filterable(recipe.index.filters).values():
        await table.create_index(each.name, config=Bitmap() if each.kind == "flag" else BTree())
    if recipe.index_of(found.rows)["vector_index"]:
        index = HnswSq(distance_type="cosine", m=recipe.index.m, ef_construction=recipe.index.ef_construction)
        for column in ("vector", "title_vector"):
            await table.create_index(column, config=index)
    await _settle(table)


async def _merge(folder: Path, rows: Rows, found: Survey, delta: Delta, *, dims: int) -> None:
    import lancedb

    table = await (await lancedb.connect_async(folder)).open_table(TABLE)
    for start in range(0, len(delta.stale_ids), _DELETE_TOGETHER):
        names = ("'" + each.replace("'", "''") + "'" for each in delta.stale_ids[start : start + _DELETE_TOGETHER])
        await table.delete(f"chunk_id IN ({', '.join(names)})")
    if len(delta.fresh):
        fresh = (delta.part_of(batch) for batch in rows.batches())
        with _reader((batch for batch in fresh if batch.num_rows), rows, found, dims=dims) as reader:
            await table.add(reader)
    await _settle(table)


async def _settle(table: Any) -> None:
    """Bring every row into every index, then drop what only earlier versions need: the folder is ours alone, and has one version to show."""
    await table.optimize(cleanup_older_than=_FOREVER)
    await table.optimize(cleanup_older_than=timedelta(milliseconds=1), delete_unverified=True)
    table.close()


def _schema(found: Survey, dims: int) -> pa.Schema:
    vector = pa.list_(pa.float32(), dims)
    added = [pa.field("content", pa.string()), pa.field("vector", vector), pa.field("title_vector", vector)]
    return pa.schema([*found.schema.remove_metadata(), *added])


@contextmanager
def _reader(batches: Iterable[pa.RecordBatch], rows: Rows, found: Survey, *, dims: int) -> Iterator[pa.RecordBatchReader]:
    """Chunks with their vectors for LanceDB to draw on. What goes wrong in them is raised as it is, not as LanceDB words it."""
    failed: list[Exception] = []

    def stored() -> Iterator[pa.RecordBatch]:
        try:
            for batch in batches:
                yield _with_vectors(batch, *rows.vectors(batch), schema=_schema(found, dims))
        except Exception as error:
            failed.append(error)
            raise

    try:
        yield pa.RecordBatchReader.from_batches(_schema(found, dims), stored())
    except RuntimeError:
        if failed:
            raise failed[0] from None
        raise


def _with_vectors(batch: pa.RecordBatch, vectors: Vectors, title_vectors: Vectors, *, schema: pa.Schema) -> pa.RecordBatch:
    dims = schema.field("vector").type.list_size
    columns = []
    for name, matrix in (("text", vectors), ("title", title_vectors)):
        _check_shape(name, matrix, rows=batch.num_rows, dims=dims)
        unit = np.abs(np.linalg.norm(matrix, axis=1) - 1) < 1e-3
        if matrix.dtype != np.float32 or not unit.all():
            bad = f"{batch.num_rows - int(unit.sum())} of {batch.num_rows} {name} vectors ({matrix.dtype}) are not finite with norm 1"
            raise SnapshotError(f"{bad}.", fix="Embed the corpus again; check the model with `ragline doctor`.")
        columns.append(pa.FixedSizeListArray.from_arrays(pa.array(matrix.ravel()), dims))
    pairs = zip(batch["title"].to_pylist(), batch["text"].to_pylist(), strict=True)
    contents = pa.array([embedded_text(title, text) for title, text in pairs], pa.string())
    return pa.record_batch([*batch.columns, contents, *columns], schema=schema)


def _check_attributes(found: Survey, recipe: Recipe) -> None:
    wanted = row_schema(recipe.index.filters)
    if not found.schema.remove_metadata().equals(wanted):
        absent = ", ".join(wanted.names[len(CHUNKS) :])
        raise SnapshotError(f"the rows are not chunks with {absent}.", fix="Take them from rag_assets.attributes.attributed_chunks.")


def _check_shape(name: str, matrix: Vectors, *, rows: int, dims: int) -> None:
    if matrix.shape != (rows, dims):
        raise SnapshotError(f"{name} vectors are {matrix.shape}, expected ({rows}, {dims}).", fix="Check dims in ragline.toml.")
