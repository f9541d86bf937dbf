"""From a source to chunks: the steps that make the corpus tables, each a plain function of a workbench.

Only what changed is read, parsed and cut; the rest is taken over from the tables of the run before. The tables are those that a first run
would make, whatever came before, and no more than a part of one is in memory.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from rag_assets.attributes import declared_of
from rag_assets.chunking import CHUNKER_VERSION, Chunker, Sizing, markup_of
from rag_assets.corpus import (
    CHUNKS,
    CUTS,
    DOCUMENTS,
    QUARANTINE,
    SOURCE_FILES,
    Table,
    TableWriter,
    batches_of,
    current_table,
    fingerprint_of,
    publish,
    require_table,
    table_batches,
    unchanged_table,
    whole_table,
)
from rag_assets.duplicates import first_copies
from rag_assets.earlier import EarlierRows, RowIndex, StoredRows, column_hashes, key_hashes
from rag_assets.parsing import PARSER_VERSION, Quarantined, parse_items
from rag_assets.sources import Document, Item, corpus_source
from rag_assets.workbench import Workbench
from rag_serving.errors import SourceError
from rag_serving.store import Store

_BLOCK_ITEMS = 2048
_BLOCK_BYTES = 16 << 20
_BLOCK_DOCUMENTS = 512
_CUT_FROM = ("doc_id", "uri", "content", "acl")


@dataclass(frozen=True, slots=True)
class Ingested:
    """A table that a step made, and in `counts` how much of it was really made in this run."""

    table: Table
    counts: Mapping[str, int]


def list_source_files(bench: Workbench) -> Ingested:
    """Every item of the configured source, by uri and version; nothing is parsed."""
    before = current_table(bench.store, "source_files")
    writer = TableWriter(bench.store, "source_files", SOURCE_FILES)
    for item in open_items(bench):
        writer.add({"uri": item.uri, "version": version_of(item), "media": item.media, "size": item.size})
    table = writer.finish(made_from=fingerprint_of("source-files-2", bench.settings.corpus.source))
    same = before is not None and before.content_sha256 == table.content_sha256
    return Ingested(replace(table, reused=same), {"listed": table.rows})


def open_items(bench: Workbench) -> Iterator[Item]:
    """The items of the configured source, in its order. Raises SourceError."""
    return corpus_source(bench.settings).items()


def version_of(item: Item) -> str:
    """What changes when the item's content, metadata or access list does."""
    beside = [dict(item.metadata), item.acl]
    return f"{item.version}+{fingerprint_of(beside)[:16]}" if any(beside) else item.version


def documents_basis(bench: Workbench) -> str:
    """What documents depend on beside their items: code, source address and limits of parsing."""
    return fingerprint_of("documents-3", PARSER_VERSION, bench.settings.corpus.source, bench.settings.parsing.model_dump())


def parse_documents(bench: Workbench) -> Ingested:
    """A document or a quarantine for each item of the source, in its order; what is as it was is neither read nor parsed.

    Counts documents read now (asked of the source), parsed now, reused, removed (of before) and quarantined (in all). SourceError when two
    items give documents of the same id; the tables then stay as they were. An item that could not be had just now, or that the source has
    otherwise than when it was listed, is asked for again by the next run.
    """
    store, files, basis = bench.store, require_table(bench.store, "source_files"), documents_basis(bench)
    made_from = fingerprint_of(basis, files.content_sha256)
    known, refused = (unchanged_table(store, name, made_from=made_from) for name in ("documents", "quarantine"))
    if known and refused:
        return Ingested(known, {"read": 0, "parsed": 0, "reused": known.rows, "removed": 0, "quarantined": refused.rows})
    documents, quarantine = TableWriter(store, "documents", DOCUMENTS), TableWriter(store, "quarantine", QUARANTINE)
    earlier, failed = _earlier_items(bench, basis)
    counts = Counter(read=0, parsed=0, reused=0)
    listed, settled = _listed(store, files), True

    def changed() -> Iterator[Item]:
        nonlocal settled
        # each item is parsed before the next is asked for, so rows taken over on the way stand in the order of the source
        for block in blocks(open_items(bench)):
            uris, versions = [item.uri for item in block], [version_of(item) for item in block]
            settled &= list(zip(uris, versions, strict=True)) == list(islice(listed, len(block)))
            kept, kept_out = earlier.unchanged(uris, versions), failed.unchanged(uris, versions)
            for place, item in enumerate(block):
                if place in kept:
                    documents.add(kept[place])
                    counts["reused"] += 1
                elif place in kept_out:
                    quarantine.add(kept_out[place])
                else:
                    yield item

    with bench.reporter.bar("reading documents") as bar:
        for item, outcome in parse_items(changed(), limits=bench.settings.parsing):
            counts["read"] += 1
            if isinstance(outcome, Quarantined):
                version = "" if outcome.passing else version_of(item)
                settled &= not outcome.passing
                quarantine.add({"item": item.uri, "version": version, "reason": outcome.reason, "detail": outcome.detail})
            else:
                counts["parsed"] += 1
                documents.add(_document_row(item, outcome))
            bar(counts["read"] + counts["reused"], max(files.rows, counts["read"] + counts["reused"]))
    if not settled or next(listed, None):
        made_from = fingerprint_of(made_from, "not settled")
    table = documents.seal(made_from=made_from, basis=basis)
    _refuse_repeated_ids(store, table)
    out = quarantine.finish(made_from=made_from, basis=basis)
    return Ingested(publish(store, table), {**counts, "removed": earlier.removed, "quarantined": out.rows})


def _listed(store: Store, files: Table) -> Iterator[tuple[str, str]]:
    """Uri and version of each item as it was listed."""
    for batch in batches_of(store, files, columns=["uri", "version"]):
        yield from zip(batch["uri"].to_pylist(), batch["version"].to_pylist(), strict=True)


def _earlier_items(bench: Workbench, basis: str) -> tuple[EarlierRows, EarlierRows]:
    documents, quarantine = (
        EarlierRows(bench.store, name, key="item", version="version", basis=basis) for name in ("documents", "quarantine")
    )
    return documents, quarantine


def quarantined(bench: Workbench, *, most: int = 20) -> tuple[dict[str, int], list[dict[str, str]]]:
    """How many items are kept out for which reason, and the first of them."""
    rows = [row for batch in table_batches(bench.store, "quarantine") for row in batch.to_pylist()]
    return dict(Counter(row["reason"] for row in rows).most_common()), rows[:most]


def blocks(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Items in order, so many at a time that their content fits in memory."""
    block: list[Item] = []
    size = 0
    for item in items:
        block.append(item)
        size += item.size
        if len(block) >= _BLOCK_ITEMS or size >= _BLOCK_BYTES:
            yield block
            block, size = [], 0
    if block:
        yield block


def _document_row(item: Item, document: Document) -> dict[str, Any]:
    metadata = dict(document.metadata)
    return {
        "doc_id": document.doc_id,
        "uri": document.uri,
        "title": document.title,
        "text": document.text,
        "metadata": json.dumps(metadata, sort_keys=True),
        "acl": list(document.acl),
        "item": item.uri,
        "version": version_of(item),
        "content": fingerprint_of(document.title, document.text, markup_of(document))[:32],
    }


def _refuse_repeated_ids(store: Store, table: Table) -> None:
    """SourceError unless every document has an id of its own. Reads the stored rows, 8 bytes of each stay in memory."""
    ordered = np.sort(column_hashes(batches_of(store, table, columns=["doc_id"]), "doc_id"))
    suspects = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    seen: dict[str, str] = {}
    for batch in batches_of(store, table, columns=["doc_id", "item"]) if suspects else ():
        for doc_id, item in zip(batch["doc_id"].to_pylist(), batch["item"].to_pylist(), strict=True):
            if int(key_hashes([doc_id])[0]) not in suspects:
                continue
            if doc_id in seen:
                raise SourceError(f"{seen[doc_id]} and {item} both give the document {doc_id!r}.", fix="Give each document its own id.")
            seen[doc_id] = item


def chunks_basis(bench: Workbench) -> str:
    """What chunks depend on beside their documents: code, settings, and the tokenizer, limit and prompt of the model that sizes them."""
    spec = bench.settings.model(sizing_model(bench))
    tokenizer = Path(spec.source.removeprefix("path:"), "tokenizer.json")
    own = fingerprint_of(tokenizer.read_text(encoding="utf-8")) if spec.source.startswith("path:") and tokenizer.is_file() else ""
    return fingerprint_of(CHUNKER_VERSION, bench.settings.chunking.model_dump(), spec.source, own, spec.max_tokens, spec.document_prompt)


def sizing_model(bench: Workbench) -> str:
    """The default embedding model, whose tokens size the chunks."""
    return (bench.settings.default_models or tuple(spec.name for spec in bench.settings.models))[0]


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


def document_ids(bench: Workbench) -> frozenset[str]:
    """The ids of all documents of the corpus."""
    return frozenset(
        doc_id for batch in table_batches(bench.store, "documents", columns=["doc_id"]) for doc_id in batch["doc_id"].to_pylist()
    )
