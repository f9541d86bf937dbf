"""The LanceDB table of a snapshot: written whole, or the changed rows merged into a copy of the parent's."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rag_assets.recipe import Recipe
from rag_assets.survey import Delta, Rows, Survey, Vectors
from rag_serving.errors import SnapshotError
from rag_serving.filters import ACL_COLUMN, filterable
from rag_serving.passages import embedded_text
from rag_serving.snapshots import TABLE

_DELETE_TOGETHER = 10_000
_FOREVER = timedelta(days=36500)


async def write_table(folder: Path, rows: Rows, found: Survey, recipe: Recipe) -> None:
    """Make the table of these rows in an empty folder, with every index. Raises SnapshotError, and what the rows raise."""
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


async def merge_rows(folder: Path, rows: Rows, found: Survey, delta: Delta, *, dims: int) -> None:
    """Make the parent's table in this folder that of the new rows: stale ones deleted, fresh ones added and indexed. Raises as `write_table`."""
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


def schema_of(found: Survey, dims: int) -> pa.Schema:
    """The columns of a table of these rows: theirs, the embedded content, and the vectors of text and title."""
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
                yield _with_vectors(batch, *rows.vectors(batch), schema=schema_of(found, dims))
        except Exception as error:
            failed.append(error)
            raise

    try:
        yield pa.RecordBatchReader.from_batches(schema_of(found, dims), stored())
    except RuntimeError:
        if failed:
            raise failed[0] from None
        raise


def _with_vectors(batch: pa.RecordBatch, vectors: Vectors, title_vectors: Vectors, *, schema: pa.Schema) -> pa.RecordBatch:
    dims = schema.field("vector").type.list_size
    columns = []
    for name, matrix in (("text", vectors), ("title", title_vectors)):
        check_shape(name, matrix, rows=batch.num_rows, dims=dims)
        unit = np.abs(np.linalg.norm(matrix, axis=1) - 1) < 1e-3
        if matrix.dtype != np.float32 or not unit.all():
            bad = f"{batch.num_rows - int(unit.sum())} of {batch.num_rows} {name} vectors ({matrix.dtype}) are not finite with norm 1"
            raise SnapshotError(f"{bad}.", fix="Embed the corpus again; check the model with `ragline doctor`.")
        columns.append(pa.FixedSizeListArray.from_arrays(pa.array(matrix.ravel()), dims))
    pairs = zip(batch["title"].to_pylist(), batch["text"].to_pylist(), strict=True)
    contents = pa.array([embedded_text(title, text) for title, text in pairs], pa.string())
    return pa.record_batch([*batch.columns, contents, *columns], schema=schema)


def check_shape(name: str, matrix: Vectors, *, rows: int, dims: int) -> None:
    """SnapshotError unless there is a vector of `dims` for each row."""
    if matrix.shape != (rows, dims):
        raise SnapshotError(f"{name} vectors are {matrix.shape}, expected ({rows}, {dims}).", fix="Check dims in ragline.toml.")
