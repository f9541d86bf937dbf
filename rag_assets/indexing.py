"""Building a snapshot: one LanceDB table with vector and full-text indexes, frozen by checks, sealed with a manifest, published once.

A snapshot is built in full, or from the newest like it: that one's files as hard links, the changed rows merged, the indexes extended.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version

import pyarrow as pa

from rag_assets.attributes import row_schema
from rag_assets.corpus import CHUNKS
from rag_assets.freezing import Health, examine
from rag_assets.increments import Increment, increment_from
from rag_assets.recipe import Recipe
from rag_assets.snapshot_table import check_shape, merge_rows, write_table
from rag_assets.survey import Rows, Survey, Vectors, survey
from rag_assets.token_vectors import store_tokens
from rag_serving.errors import SnapshotError
from rag_serving.snapshots import Manifest, check_inherited, find_by_build_key, hash_tree, link_files, seal, snapshot_key
from rag_serving.store import Store

_ANN_FLOOR = 0.95
_log = logging.getLogger("ragline")


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
        check_shape(name, matrix, rows=chunks.num_rows, dims=recipe.model.dims)
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


async def _publish(store: Store, recipe: Recipe, rows: Rows, found: Survey, increment: Increment | None) -> tuple[Manifest, Health]:
    parent = store.folder(snapshot_key(increment.parent.snapshot_id)) if increment else None
    with store.staging("snapshots/build") as folder:
        if increment and parent:
            link_files(parent, folder)
            await merge_rows(folder, rows, found, increment.delta, dims=recipe.model.dims)
        else:
            await write_table(folder, rows, found, recipe)
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


def _check_attributes(found: Survey, recipe: Recipe) -> None:
    wanted = row_schema(recipe.index.filters)
    if not found.schema.remove_metadata().equals(wanted):
        absent = ", ".join(wanted.names[len(CHUNKS) :])
        raise SnapshotError(f"the rows are not chunks with {absent}.", fix="Take them from rag_assets.attributes.attributed_chunks.")
