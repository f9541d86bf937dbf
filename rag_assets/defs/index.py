"""From chunks to a published snapshot, per embedding model."""

from typing import Any

import dagster as dg

from rag_assets import steps
from rag_assets.defs.corpus import chunks
from rag_assets.defs.resources import MODELS
from rag_assets.defs.traced import asset
from rag_assets.workbench import Workbench


def _check(asset: str, name: str, promise: str) -> dg.AssetCheckSpec:
    return dg.AssetCheckSpec(name, asset=asset, blocking=True, description=promise)


@asset(
    group_name="index",
    kinds={"python"},
    code_version="2",
    partitions_def=MODELS,
    deps=[chunks],
    pool="embedder",
    check_specs=[
        _check("embeddings", "vectors_healthy", "Every text has a finite vector of norm 1."),
        _check("embeddings", "vectors_cover_chunks", "Every chunk has a vector of its text and one of its title."),
    ],
)
def embeddings(context: dg.AssetExecutionContext, bench: dg.ResourceParam[Workbench]) -> dg.MaterializeResult:
    """Vectors of every chunk and title, content-addressed: a text is embedded once per model fingerprint."""
    found = steps.embed_corpus(bench, context.partition_key)
    facts: dict[str, Any] = {"dagster/row_count": found.covered, "dims": found.dims, "computed": found.computed}
    facts |= {"fingerprint": found.fingerprint, "seconds": found.seconds}
    covered = {"chunks": found.rows, "with_vectors": found.covered}
    checks = [
        dg.AssetCheckResult(check_name="vectors_healthy", passed=found.healthy, metadata={"norm_error": found.norm_error}),
        dg.AssetCheckResult(check_name="vectors_cover_chunks", passed=found.covered == found.rows, metadata=covered),
    ]
    return dg.MaterializeResult(metadata=facts, data_version=dg.DataVersion(found.content_sha256), check_results=checks)


@asset(
    group_name="index",
    kinds={"lancedb"},
    code_version="2",
    partitions_def=MODELS,
    deps=[embeddings],
    check_specs=[
        _check("index_snapshot", "index_covers_rows", "Indexes cover every row."),
        _check("index_snapshot", "rows_are_the_chunks", "Each chunk is one row, and each row is a chunk: no loss, no orphan."),
    ],
)
def index_snapshot(context: dg.AssetExecutionContext, bench: dg.ResourceParam[Workbench]) -> dg.MaterializeResult:
    """An immutable LanceDB snapshot with a manifest of every byte."""
    built = steps.snapshot_corpus(bench, context.partition_key)
    manifest, coverage = built.manifest, steps.cover_snapshot(bench, built.manifest)
    facts: dict[str, Any] = {"dagster/row_count": coverage.rows, "snapshot_id": manifest.snapshot_id, "reused": built.reused}
    facts |= {"built": manifest.built, "parent": manifest.parent or "none", **manifest.delta, "megabytes": manifest.bytes / 1e6}
    facts |= {"documents": manifest.documents, "manifest_sha256": manifest.sha256, "index": dg.MetadataValue.json(dict(manifest.index))}
    health = {"self_retrieval": built.health.self_retrieval, "ann_recall": built.health.ann_recall} if built.health else {}
    indexed = {"rows": coverage.rows, **coverage.indexed_rows, **health}
    rows = {"rows": coverage.rows, "lost": coverage.lost, "orphans": coverage.orphans}
    checks = [
        dg.AssetCheckResult(check_name="index_covers_rows", passed=coverage.indexed, metadata=indexed),
        dg.AssetCheckResult(check_name="rows_are_the_chunks", passed=coverage.conserved, metadata=rows),
    ]
    return dg.MaterializeResult(metadata=facts, data_version=dg.DataVersion(manifest.sha256), check_results=checks)
