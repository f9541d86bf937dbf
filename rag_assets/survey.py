"""What a snapshot is built of, looked at in one pass: ids, contents, titles and a sample of the chunks, and how they differ from a parent's.

The rows pass by a batch at a time; what stays in memory is at most 64 bytes a chunk, whatever its text.
"""

import hashlib
from collections.abc import AsyncIterable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rag_serving.errors import SnapshotError

Vectors = NDArray[np.float32]
Digests = NDArray[np.bytes_]  # 16 bytes each
_SAMPLE = 200


@dataclass(frozen=True, slots=True)
class Rows:
    """Chunks and their vectors. `batches` gives all chunks in order, as often as it is called.

    `vectors` gives the text and the title vectors of the chunks of a batch, or of some of its rows: float32 (rows, dims), of unit norm.
    `tokens` gives the token vectors of embedded texts, float32 (tokens, dims) of unit norm each; None where reranking does not need them.
    """

    batches: Callable[[], Iterable[pa.RecordBatch]]
    vectors: Callable[[pa.RecordBatch], tuple[Vectors, Vectors]]
    tokens: Callable[[Sequence[str]], list[Vectors]] | None = None


@dataclass(frozen=True, slots=True)
class Survey:
    """All chunks as digests of their ids and of their whole rows, in order; `sample` holds 200 rows, the same ones for the same ids.

    `title_distinctness` is the share of distinct non-empty titles among the documents, 0 to 1, whatever their case. Titles that name a
    document say much about it; a heading shared by a hundred documents says little. Title signals weigh by this.
    """

    ids: Digests
    contents: Digests
    schema: pa.Schema
    title_distinctness: float
    sample: pa.RecordBatch

    @property
    def rows(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class Delta:
    """How chunks differ from those of a parent: the digests of rows to write, sorted, and the ids of the parent's rows to drop.

    A chunk whose id stayed while another field changed is dropped and written; `changed` counts those, and `added` and `removed` do not.
    """

    fresh: Digests
    stale_ids: tuple[str, ...]
    changed: int

    @property
    def added(self) -> int:
        return len(self.fresh) - self.changed

    @property
    def removed(self) -> int:
        return len(self.stale_ids) - self.changed

    @property
    def rows(self) -> int:
        return self.added + self.changed + self.removed

    def part_of(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """The rows of a batch that are to be written."""
        return batch.filter(pa.array(_among(row_digests(batch), self.fresh)))


def survey(batches: Iterable[pa.RecordBatch]) -> Survey:
    """One pass over the chunks. SnapshotError when there are none or two share an id."""
    ids, contents, titles, documents = [], [], [], []
    sample: pa.RecordBatch | None = None
    for batch in (batch for batch in batches if batch.num_rows):
        ids.append(id_digests(batch))
        contents.append(row_digests(batch))
        documents.append(np.unique(_digests(batch["doc_id"].to_pylist())))
        folded = (title.strip().casefold() for title in batch["title"].to_pylist())
        titles.append(np.unique(_digests(title for title in folded if title)))
        sample = batch if sample is None else pa.concat_batches([sample, batch])
        sample = sample.take(pa.array(np.argsort(id_digests(sample))[:_SAMPLE]))
    if sample is None:
        raise SnapshotError("there are no chunks to index.", fix="Check the corpus source.")
    every = np.concatenate(ids)
    if len(np.unique(every)) != len(every):
        raise SnapshotError("two chunks share an id.", fix="Check the chunker.")
    distinctness = len(np.unique(np.concatenate(titles))) / len(np.unique(np.concatenate(documents)))
    return Survey(every, np.concatenate(contents), sample.schema, round(distinctness, 6), sample)


async def difference(found: Survey, before: AsyncIterable[pa.RecordBatch]) -> Delta:
    """What has to change in a parent whose rows are `before`, with the same columns, to make it hold the chunks of the survey."""
    known, stale_ids, stale = [], [], []
    wanted = np.sort(found.contents)
    async for batch in before:
        contents = row_digests(batch)
        known.append(contents)
        gone = batch.filter(pa.array(~_among(contents, wanted)))
        stale_ids.extend(gone["chunk_id"].to_pylist())
        stale.append(id_digests(gone))
    fresh = ~_among(found.contents, np.sort(np.concatenate(known)))
    changed = int(np.isin(found.ids[fresh], np.concatenate(stale)).sum())
    return Delta(np.sort(found.contents[fresh]), tuple(stale_ids), changed)


def id_digests(batch: pa.RecordBatch) -> Digests:
    return _digests(batch["chunk_id"].to_pylist())


def row_digests(batch: pa.RecordBatch) -> Digests:
    """A digest of each row over all its columns."""
    return _digests(repr(row) for row in zip(*(column.to_pylist() for column in batch.columns), strict=True))


def _digests(values: Iterable[str]) -> Digests:
    def each() -> Iterator[bytes]:
        for value in values:
            yield hashlib.blake2b(value.encode(errors="surrogatepass"), digest_size=16).digest()

    return np.frombuffer(b"".join(each()), dtype="S16")


def _among(values: Digests, ordered: Digests) -> NDArray[np.bool_]:
    places = np.searchsorted(ordered, values)
    places[places == len(ordered)] = 0
    return ordered[places] == values if len(ordered) else np.zeros(len(values), dtype=bool)
