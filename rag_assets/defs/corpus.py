"""From a source to chunks."""

from collections.abc import Iterable
from typing import Any

import dagster as dg

from rag_assets import ingestion
from rag_assets.contracts import CONTRACTS, Expectation, check_contract
from rag_assets.corpus import Table, read_table
from rag_assets.workbench import Workbench


def _result(table: Table, **metadata: Any) -> dg.MaterializeResult:
    facts: dict[str, Any] = {"dagster/row_count": table.rows, "reused": table.reused, "content_sha256": table.content_sha256, **metadata}
    return dg.MaterializeResult(metadata=facts, data_version=dg.DataVersion(table.content_sha256))


@dg.asset(group_name="corpus", kinds={"file"}, code_version="1")
def source_files(bench: dg.ResourceParam[Workbench]) -> dg.MaterializeResult:
    """The files of the configured source, with hash and size."""
    return _result(ingestion.list_source_files(bench), source=bench.settings.corpus.source)


@dg.asset(group_name="corpus", kinds={"parquet"}, code_version="1", deps=[source_files])
def documents(bench: dg.ResourceParam[Workbench]) -> dg.MaterializeResult:
    """One parsed text per document, with title, uri and metadata."""
    return _result(ingestion.parse_documents(bench))


@dg.asset(group_name="corpus", kinds={"parquet"}, code_version="1", deps=[documents])
def chunks(bench: dg.ResourceParam[Workbench]) -> dg.MaterializeResult:
    """Passages of the documents, with exact character spans, sized for the default embedding model."""
    return _result(ingestion.split_chunks(bench), max_tokens=bench.settings.chunking.max_tokens)


def _contract(table_name: str, asset: dg.AssetsDefinition) -> dg.AssetChecksDefinition:
    expectations: tuple[Expectation, ...] = CONTRACTS[table_name]

    @dg.multi_asset_check(
        name=f"{table_name}_contract",
        specs=[dg.AssetCheckSpec(e.name, asset=asset, description=e.promise, blocking=e.critical) for e in expectations],
    )
    def contract(bench: dg.ResourceParam[Workbench]) -> Iterable[dg.AssetCheckResult]:
        _, rows = read_table(bench.store, table_name)
        for finding in check_contract(expectations, rows):
            yield dg.AssetCheckResult(
                check_name=finding.expectation.name,
                passed=finding.passed,
                severity=dg.AssetCheckSeverity.ERROR if finding.expectation.critical else dg.AssetCheckSeverity.WARN,
                metadata=dict(finding.observed),
            )

    return contract


documents_contract = _contract("documents", documents)
chunks_contract = _contract("chunks", chunks)
