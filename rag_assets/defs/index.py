"""From chunks to a published snapshot, per embedding model."""

from typing import Any

import dagster as dg

from rag_assets import steps
from rag_assets.defs.corpus import chunks
from rag_assets.defs.resources import MODELS
from rag_assets.workbench import Workbench


@dg.asset(
    group_name="index",
    kinds={"python"},
    partitions_def=MODELS,
    deps=[chunks],
    pool="embedder",
    check_specs=[
        dg.AssetCheckSpec("vectors_healthy", asset="embeddings", blocking=True, description="Every text has a finite vector of norm 1.")
    ],
)
def embeddings(context: dg.AssetExecutionContext, bench: dg.ResourceParam[Workbench]) -> dg.MaterializeResult:
    """Vectors of every chunk and title, content-addressed: a text is embedded once per model fingerprint."""
    embedded = steps.embed_corpus(bench, context.partition_key)
    rows, dims = embedded.texts.vectors.shape
    facts = {
        "dagster/row_count": rows,
        "dims": dims,
        "computed": embedded.computed,
        "fingerprint": embedded.fingerprint,
        "seconds": embedded.seconds,
    }
    check = dg.AssetCheckResult(check_name="vectors_healthy", passed=embedded.healthy, metadata={"norm_error": embedded.norm_error})
    return dg.MaterializeResult(metadata=facts, check_results=[check])


@dg.asset(
    group_name="index",
    kinds={"lancedb"},
    partitions_def=MODELS,
    deps=[embeddings],
    check_specs=[dg.AssetCheckSpec("index_covers_rows", asset="index_snapshot", blocking=True, description="Indexes cover every row.")],
)
def index_snapshot(context: dg.AssetExecutionContext, bench: dg.ResourceParam[Workbench]) -> dg.MaterializeResult:
    """An immutable LanceDB snapshot with a manifest of every byte."""
    built = steps.snapshot_corpus(bench, context.partition_key)
    manifest = built.manifest
    facts: dict[str, Any] = {
        "dagster/row_count": manifest.rows,
        "snapshot_id": manifest.snapshot_id,
        "reused": built.reused,
        "megabytes": manifest.bytes / 1e6,
    }
    facts |= {"documents": manifest.documents, "manifest_sha256": manifest.sha256, "index": dg.MetadataValue.json(dict(manifest.index))}
    health = {"self_retrieval": built.health.self_retrieval, "ann_recall": built.health.ann_recall} if built.health else {}
    check = dg.AssetCheckResult(check_name="index_covers_rows", passed=not (built.health and built.health.problems), metadata=health)
    return dg.MaterializeResult(metadata=facts, data_version=dg.DataVersion(manifest.sha256), check_results=[check])
