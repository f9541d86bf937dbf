"""The contracts of documents, chunks and eval set: one asset check an expectation."""

from collections.abc import Callable, Iterable

import dagster as dg

from rag_assets import steps
from rag_assets.contracts import CONTRACTS, ContractRows, check_contract, eval_set_rows, stored_rows
from rag_assets.defs.traced import multi_asset_check
from rag_assets.workbench import Workbench


def _contract(name: str, rows: Callable[[Workbench], ContractRows]) -> dg.AssetChecksDefinition:
    specs = [dg.AssetCheckSpec(each.name, asset=name, description=each.promise, blocking=each.critical) for each in CONTRACTS[name]]

    @multi_asset_check(name=f"{name}_contract", specs=specs)
    def contract(bench: dg.ResourceParam[Workbench]) -> Iterable[dg.AssetCheckResult]:
        checked = check_contract(name, rows(bench), docs=bench.settings.home / "contracts")
        for finding in checked.findings:
            critical = finding.expectation.critical
            yield dg.AssetCheckResult(
                check_name=finding.expectation.name,
                asset_key=name,
                passed=finding.passed,
                severity=dg.AssetCheckSeverity.ERROR if critical else dg.AssetCheckSeverity.WARN,
                metadata={**finding.observed, "data_docs": dg.MetadataValue.url(checked.page.as_uri())},
            )

    return contract


documents_contract = _contract("documents", lambda bench: stored_rows(bench.store, "documents"))
chunks_contract = _contract("chunks", lambda bench: stored_rows(bench.store, "chunks"))
eval_set_contract = _contract("eval_set", lambda bench: eval_set_rows(steps.load_eval_set(bench)))
