"""From a source to chunks: the steps that make the corpus tables, each a plain function of a workbench."""

import json
from dataclasses import asdict

from rag_assets.chunking import chunk_documents
from rag_assets.corpus import CHUNKS, DOCUMENTS, SOURCE_FILES, Table, current_table, derive, fingerprint_of, read_table
from rag_assets.sources import Document, open_source
from rag_assets.workbench import Workbench


def list_source_files(bench: Workbench) -> Table:
    address = bench.settings.corpus.source
    files = [asdict(file) for file in open_source(address, root=bench.settings.root).files()]
    return derive(
        bench.store, "source_files", made_from=fingerprint_of("source-files-1", address, files), rows=lambda: files, schema=SOURCE_FILES
    )


def parse_documents(bench: Workbench) -> Table:
    files = require_table(bench, "source_files")
    source = open_source(bench.settings.corpus.source, root=bench.settings.root)

    def rows() -> list[dict[str, object]]:
        with bench.reporter.bar("reading documents"):
            return [
                {**asdict(document), "metadata": json.dumps(dict(document.metadata), sort_keys=True)} for document in source.documents()
            ]

    return derive(
        bench.store,
        "documents",
        made_from=fingerprint_of("documents-1", bench.settings.corpus.source, files.content_sha256),
        rows=rows,
        schema=DOCUMENTS,
    )


def split_chunks(bench: Workbench) -> Table:
    documents, rows = read_table(bench.store, "documents")
    chunking = bench.settings.chunking
    sizing = bench.settings.model(sizing_model(bench))
    made_from = fingerprint_of("chunks-1", documents.content_sha256, chunking.model_dump(), sizing.source)

    def chunks() -> list[dict[str, object]]:
        parsed = [Document(**{**row, "metadata": json.loads(row["metadata"])}) for row in rows.to_pylist()]
        tokenizer = bench.model(sizing.name).tokenizer
        return [asdict(chunk) for chunk in chunk_documents(parsed, max_tokens=chunking.max_tokens, tokenizer=tokenizer)]

    return derive(bench.store, "chunks", made_from=made_from, rows=chunks, schema=CHUNKS)


def sizing_model(bench: Workbench) -> str:
    """The default embedding model, whose tokens size the chunks."""
    return (bench.settings.default_models or tuple(spec.name for spec in bench.settings.models))[0]


def document_ids(bench: Workbench) -> frozenset[str]:
    _, documents = read_table(bench.store, "documents")
    return frozenset(documents["doc_id"].to_pylist())


def require_table(bench: Workbench, name: str) -> Table:
    return current_table(bench.store, name) or read_table(bench.store, name)[0]
