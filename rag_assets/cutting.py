"""From documents to chunks: what each document is cut into, and which keep the chunks that they had.

Only documents that changed are cut; the chunks of the rest are taken over from the run before. The tables are those that a first run would
make, whatever came before, and no more than a part of one is in memory.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from rag_assets.attributes import declared_of
from rag_assets.chunking import CHUNKER_VERSION, Chunker, Sizing
from rag_assets.corpus import (
    CHUNKS,
    CUTS,
    Table,
    TableWriter,
    batches_of,
    current_table,
    fingerprint_of,
    require_table,
    table_batches,
    unchanged_table,
    whole_table,
)
from rag_assets.duplicates import first_copies
from rag_assets.earlier import RowIndex, StoredRows
from rag_assets.ingestion import Ingested
from rag_assets.sources import Document
from rag_assets.workbench import Workbench
from rag_serving.signals import contract, work
from rag_serving.store import Store

_BLOCK_DOCUMENTS = 512
_CUT_FROM = ("doc_id", "uri", "content", "acl")


def chunks_basis(bench: Workbench) -> str:
    """What chunks depend on beside their documents: code, settings, and the tokenizer, limit and prompt of the model that sizes them."""
    spec = bench.settings.model(sizing_model(bench))
    tokenizer = Path(spec.source.removeprefix("path:"), "tokenizer.json")
    own = fingerprint_of(tokenizer.read_text(encoding="utf-8")) if spec.source.startswith("path:") and tokenizer.is_file() else ""
    return fingerprint_of(CHUNKER_VERSION, bench.settings.chunking.model_dump(), spec.source, own, spec.max_tokens, spec.document_prompt)


def sizing_model(bench: Workbench) -> str:
    """The default embedding model, whose tokens size the chunks."""
    return (bench.settings.default_models or tuple(spec.name for spec in bench.settings.models))[0]


@work.worked(contract.CUT, lambda made: {contract.ROWS: made.table.rows, contract.REUSED: made.counts["reused"]})
def split_chunks(bench: Workbench) -> Ingested:
    """Chunks of the documents, in their order; documents whose title and text are as they were keep theirs.

    Of documents equal in title, text, access list and filterable metadata only the first has chunks, so that repeating a text gives it no
    weight. Counts the documents chunked now, reused, aliases (equal to one before), and the truncated chunks: those that the sizing model cuts off.
    """
    store, documents, basis = bench.store, require_table(bench.store, "documents"), chunks_basis(bench)
    filters = bench.settings.index.filters
    made_from = fingerprint_of(basis, documents.content_of(*_CUT_FROM))
    if filters:
        made_from = fingerprint_of(made_from, documents.content_of("metadata"), filters)
    known, cuts = (unchanged_table(store, name, made_from=made_from) for name in ("chunks", "cuts"))
    if known and cuts:
        return Ingested(known, {"chunked": 0, "reused": documents.rows, **_cut_counts(store, cuts)})
    chunks, cut_rows = TableWriter(store, "chunks", CHUNKS), TableWriter(store, "cuts", CUTS)
    earlier = _EarlierChunks(store, basis)
    first = first_copies(
        f"{row['content']}{row['acl']}{declared_of(row['metadata'], filters) or ''}"
        for batch in batches_of(store, documents, columns=["content", "acl", "metadata"])
        for row in batch.to_pylist()
    )
    repeated = np.unique(first[first != np.arange(len(first))]).tolist()
    originals = dict(zip(repeated, StoredRows(store, documents, columns=["doc_id"]).take(repeated), strict=True))
    counts = Counter(chunked=0, reused=0)

    chunker = cache(lambda: _chunker(bench))
    with bench.reporter.bar("cutting chunks") as bar:
        done = 0
        for batch in batches_of(store, documents, batch_rows=_BLOCK_DOCUMENTS):
            rows = batch.to_pylist()
            copied = {place: int(at) for place, at in enumerate(first[done : done + len(rows)]) if at != done + place}
            alias_of = {place: originals[at]["doc_id"] for place, at in copied.items()}
            kept = earlier.chunks_of(rows)
            fresh = [place for place in range(len(rows)) if place not in kept and place not in alias_of]
            cut = dict(zip(fresh, _cut(chunker(), [rows[place] for place in fresh]), strict=True)) if fresh else {}
            for place, row in enumerate(rows):
                found, over = ([], 0) if place in alias_of else kept.get(place) or cut[place]
                chunks.extend({**chunk, "uri": row["uri"]} for chunk in found)
                cut_rows.add(
                    {
                        "doc_id": row["doc_id"],
                        "content": "" if place in alias_of else row["content"],
                        "chunks": len(found),
                        "truncated": over,
                        "alias_of": alias_of.get(place, ""),
                    }
                )
            counts["chunked"] += len(fresh)
            counts["reused"] += len(rows) - len(fresh) - len(alias_of)
            done += len(rows)
            bar(done, documents.rows)
    cuts = cut_rows.finish(made_from=made_from, basis=basis)
    return Ingested(chunks.finish(made_from=made_from, basis=basis), {**counts, **_cut_counts(store, cuts)})


def _chunker(bench: Workbench) -> Chunker:
    spec, settings = bench.settings.model(sizing_model(bench)), bench.settings.chunking
    sizing = Sizing(settings.max_tokens, bench.model(spec.name).tokenizer, window=spec.max_tokens, prompt=spec.document_prompt)
    return Chunker(sizing, strategy=settings.strategy, overlap=settings.overlap)


def _cut(chunker: Chunker, rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[list[dict[str, Any]], int]]:
    """The chunks of each document and how many of them are truncated."""
    documents = [Document(row["doc_id"], row["uri"], row["title"], row["text"], json.loads(row["metadata"])) for row in rows]
    cut = list(chunker.chunks(documents))
    over = iter(chunker.truncated([chunk for found in cut for chunk in found]))
    for found in cut:
        yield [{name: getattr(chunk, name) for name in CHUNKS.names} for chunk in found], sum(next(over) for _ in found)


class _EarlierChunks:
    """The chunks that documents had in the run before, if they were cut on the same basis."""

    def __init__(self, store: Store, basis: str) -> None:
        chunks, cuts = whole_table(store, "chunks"), whole_table(store, "cuts")
        usable = chunks is not None and cuts is not None and chunks.made_from == cuts.made_from and cuts.basis == basis
        self._index = RowIndex(store, cuts if usable else None, key="doc_id", version="content")
        self._rows = StoredRows(store, chunks) if usable and chunks else None
        batches = batches_of(store, cuts, columns=["chunks", "truncated"]) if usable and cuts else ()
        columns = [(batch["chunks"].to_numpy(), batch["truncated"].to_numpy()) for batch in batches]
        self._ends = np.cumsum(np.concatenate([np.empty(0, np.int64), *(chunks for chunks, _ in columns)]))
        self._truncated = np.concatenate([np.empty(0, np.int64), *(over for _, over in columns)])

    def chunks_of(self, documents: Sequence[Mapping[str, Any]]) -> dict[int, tuple[list[dict[str, Any]], int]]:
        """Chunks and how many of them are truncated, by place, of the documents that need not be cut."""
        if self._rows is None:
            return {}
        positions, same = self._index.find([row["doc_id"] for row in documents], [row["content"] for row in documents])
        places = np.flatnonzero(same).tolist()
        spans = [(int(self._ends[at - 1]) if at else 0, int(self._ends[at])) for at in positions[places].tolist()]
        rows = iter(self._rows.take([row for span in spans for row in range(*span)]))
        return {
            place: ([next(rows) for _ in range(*span)], int(self._truncated[positions[place]]))
            for place, span in zip(places, spans, strict=True)
        }


def _cut_counts(store: Store, cuts: Table) -> dict[str, int]:
    aliases = over = 0
    for batch in batches_of(store, cuts, columns=["truncated", "alias_of"]):
        aliases += sum(bool(alias) for alias in batch["alias_of"].to_pylist())
        over += sum(batch["truncated"].to_pylist())
    return {"aliases": aliases, "truncated": over}


def truncation(bench: Workbench) -> tuple[int, int]:
    """How many chunks the sizing model would cut off, and of how many."""
    return _cut_counts(bench.store, require_table(bench.store, "cuts"))["truncated"], require_table(bench.store, "chunks").rows


def aliases(bench: Workbench) -> dict[str, str]:
    """doc_id of each document without chunks of its own -> that of the equal one which stands for it; none before chunks are cut."""
    if current_table(bench.store, "cuts") is None:
        return {}
    batches = table_batches(bench.store, "cuts", columns=["doc_id", "alias_of"])
    pairs = (pair for batch in batches for pair in zip(batch["doc_id"].to_pylist(), batch["alias_of"].to_pylist(), strict=True))
    return {doc_id: alias_of for doc_id, alias_of in pairs if alias_of}
