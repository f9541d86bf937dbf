"""From a source to chunks, and what must hold of them."""

from typing import Any

import dagster as dg

from rag_assets import cutting, ingestion
from rag_assets.chunking import CHUNKER_VERSION
from rag_assets.conservation import conservation
from rag_assets.defs.traced import asset, asset_check
from rag_assets.duplicates import profile_documents
from rag_assets.ingestion import Ingested
from rag_assets.parsing import PARSER_VERSION
from rag_assets.workbench import Workbench


def _result(made: Ingested, **metadata: Any) -> dg.MaterializeResult:
    table = made.table
    facts: dict[str, Any] = {"dagster/row_count": table.rows, "as_before": table.reused, "content_sha256": table.content_sha256}
    return dg.MaterializeResult(metadata={**facts, **made.counts, **metadata}, data_version=dg.DataVersion(table.content_sha256))


@asset(group_name="corpus", kinds={"file"}, code_version="2")
def source_files(bench: dg.ResourceParam[Workbench]) -> dg.MaterializeResult:
    """What the configured source holds, by uri and version; nothing is parsed yet."""
    return _result(ingestion.list_source_files(bench), source=bench.settings.corpus.source)


@asset(group_name="corpus", kinds={"parquet"}, code_version=PARSER_VERSION, deps=[source_files])
def documents(bench: dg.ResourceParam[Workbench]) -> dg.MaterializeResult:
    """One parsed text per document, with title, uri and metadata; what could not be parsed is in quarantine, by name and reason."""
    made = ingestion.parse_documents(bench)
    reasons, first = ingestion.quarantined(bench)
    profile = profile_documents(bench.store)
    facts: dict[str, Any] = {"near_duplicates": profile.near_duplicates, "boilerplate": profile.boilerplate, "profiled": profile.profiled}
    facts |= {"languages": dg.MetadataValue.json(dict(profile.languages)), "near_duplicate_pairs": dg.MetadataValue.json(profile.pairs)}
    return _result(made, **facts, quarantine=dg.MetadataValue.json({"reasons": reasons, "first": first}))


@asset(group_name="corpus", kinds={"parquet"}, code_version=CHUNKER_VERSION, deps=[documents])
def chunks(bench: dg.ResourceParam[Workbench]) -> dg.MaterializeResult:
    """Passages of the documents, with exact character spans, sized for the default embedding model; equal documents once."""
    return _result(cutting.split_chunks(bench), **bench.settings.chunking.model_dump())


@asset_check(asset=chunks, blocking=True, description="Every document with words has a chunk, and every chunk a document.")
def nothing_lost(bench: dg.ResourceParam[Workbench]) -> dg.AssetCheckResult:
    found = conservation(bench.store)
    facts = {"documents": found.documents, "chunks": found.chunks, "aliases": found.aliases, "wordless": found.wordless}
    facts |= {"lost": found.lost, "orphans": found.orphans, "repeated": found.repeated}
    return dg.AssetCheckResult(passed=found.holds, metadata={**facts, "examples": dg.MetadataValue.json(found.examples)})


@asset_check(asset=chunks, description="The embedding model that sizes the chunks reads each of them whole, title and prompt included.")
def nothing_truncated(bench: dg.ResourceParam[Workbench]) -> dg.AssetCheckResult:
    over, total = cutting.truncation(bench)
    facts = {"truncated": over, "truncation_rate": over / max(total, 1)}
    return dg.AssetCheckResult(passed=over == 0, severity=dg.AssetCheckSeverity.WARN, metadata=facts)
