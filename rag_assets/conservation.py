"""Conservation from documents to chunks: nothing with words is without a chunk, and no chunk is of something else."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rag_assets.corpus import require_table, table_batches
from rag_assets.earlier import column_hashes
from rag_serving.store import Store


@dataclass(frozen=True, slots=True)
class Conservation:
    """What became of the documents.

    `lost` are those with text or title that have no chunk and no equal document that stands for them; `orphans` are chunks of no document,
    `repeated` chunks whose id another has. `examples` name up to five documents or chunks at fault.
    """

    documents: int
    chunks: int
    aliases: int
    wordless: int
    lost: int
    orphans: int
    repeated: int
    examples: tuple[str, ...]

    @property
    def holds(self) -> bool:
        return not (self.lost or self.orphans or self.repeated)


def conservation(store: Store) -> Conservation:
    """Compare the stored documents with the stored chunks, by what the tables themselves say. Some 16 bytes a row stay in memory."""
    owners, ids = _hashes(store, "chunks", "doc_id"), _hashes(store, "documents", "doc_id")
    none = np.empty(0, np.bool_)
    has_words = np.concatenate([none, *(_has_words(batch) for batch in table_batches(store, "documents", columns=["title", "text"]))])
    standing = np.concatenate([none, *(_stands(batch) for batch in table_batches(store, "cuts", columns=["alias_of"]))])
    is_alias = np.zeros(len(ids), np.bool_)
    is_alias[: len(standing)] = standing[: len(ids)]
    lost = has_words & ~is_alias & ~np.isin(ids, owners)
    orphans = ~np.isin(owners, ids[~is_alias])
    chunk_ids = np.sort(_hashes(store, "chunks", "chunk_id"))
    return Conservation(
        documents=len(ids),
        chunks=require_table(store, "chunks").rows,
        aliases=int(is_alias.sum()),
        wordless=int((~has_words).sum()),
        lost=int(lost.sum()),
        orphans=int(orphans.sum()),
        repeated=int((chunk_ids[1:] == chunk_ids[:-1]).sum()),
        examples=(*_named(store, "documents", "doc_id", lost), *_named(store, "chunks", "chunk_id", orphans))[:5],
    )


def _hashes(store: Store, table: str, column: str) -> NDArray[np.uint64]:
    return column_hashes(table_batches(store, table, columns=[column]), column)


def _has_words(batch: pa.RecordBatch) -> NDArray[np.bool_]:
    words = [pc.greater(pc.utf8_length(pc.utf8_trim_whitespace(batch[column])), 0) for column in ("title", "text")]
    return np.asarray(pc.or_(*words).to_numpy(zero_copy_only=False), np.bool_)


def _stands(batch: pa.RecordBatch) -> NDArray[np.bool_]:
    return np.asarray(pc.greater(pc.utf8_length(batch["alias_of"]), 0).to_numpy(zero_copy_only=False), np.bool_)


def _named(store: Store, table: str, column: str, faults: Sequence[bool] | NDArray[np.bool_]) -> Iterator[str]:
    """The names of up to five rows at fault."""
    wanted = np.flatnonzero(faults)[:5]
    passed = 0
    for batch in table_batches(store, table, columns=[column]) if len(wanted) else ():
        here = wanted[(wanted >= passed) & (wanted < passed + batch.num_rows)] - passed
        yield from batch[column].take(pa.array(here)).to_pylist()
        passed += batch.num_rows
