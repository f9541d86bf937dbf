"""From a source to documents: the steps that make the first corpus tables, each a plain function of a workbench.

Only what changed is read and parsed; the rest is taken over from the tables of the run before. The tables are those that a first run would
make, whatever came before, and no more than a part of one is in memory.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from rag_assets.chunking import markup_of
from rag_assets.corpus import (
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
)
from rag_assets.earlier import EarlierRows, column_hashes, key_hashes
from rag_assets.parsing import PARSER_VERSION, Quarantined, parse_items
from rag_assets.sources import Document, Item, corpus_source
from rag_assets.workbench import Workbench
from rag_serving.errors import SourceError
from rag_serving.signals import contract, work
from rag_serving.store import Store

_BLOCK_ITEMS = 2048
_BLOCK_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Ingested:
    """A table that a step made, and in `counts` how much of it was really made in this run."""

    table: Table
    counts: Mapping[str, int]


@work.worked(contract.LIST, lambda made: {contract.ROWS: made.table.rows})
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


@work.worked(contract.PARSE, lambda made: {contract.ROWS: made.table.rows, contract.REUSED: made.counts["reused"]})
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


def document_ids(bench: Workbench) -> frozenset[str]:
    """The ids of all documents of the corpus."""
    return frozenset(
        doc_id for batch in table_batches(bench.store, "documents", columns=["doc_id"]) for doc_id in batch["doc_id"].to_pylist()
    )
