"""Has anything moved since the release? Weekly measurements of the champion; what they find is held or alarmed by the sensors."""

from typing import Any

import dagster as dg

from rag_assets import detectors
from rag_assets.defs.evaluation import eval_set
from rag_assets.defs.index import index_snapshot
from rag_assets.defs.release import production_release
from rag_assets.defs.traced import asset
from rag_assets.drift import DriftReport
from rag_assets.workbench import Workbench


def _check(name: str, asset: str, promise: str, *, blocking: bool = False) -> list[dg.AssetCheckSpec]:
    return [dg.AssetCheckSpec(name, asset=asset, blocking=blocking, description=promise)]


def _result(report: DriftReport, check: str, **more: float) -> dg.MaterializeResult:
    """The numbers of a report, plotted, and a check that fails on its findings: as an error on one that holds, else as a warning."""
    measured: dict[str, Any] = {**report.numbers, **report.facts}
    found = {finding.kind: " ".join(each.detail for each in report.findings if each.kind == finding.kind) for finding in report.findings}
    holds = any(finding.severity == "hold" for finding in report.findings)
    severity = dg.AssetCheckSeverity.ERROR if holds else dg.AssetCheckSeverity.WARN
    outcome = dg.AssetCheckResult(
        check_name=check, passed=not found, severity=severity, description=report.summary, metadata=measured | found
    )
    facts = {"champion": report.snapshot_id or "none", "summary": report.summary, **measured, **more}
    return dg.MaterializeResult(metadata=facts, check_results=[outcome])


@asset(
    group_name="drift",
    kinds={"json"},
    pool="embedder",
    deps=[production_release, eval_set],
    check_specs=_check("mrr_held", "champion_evaluation", "The champion measured afresh is as good as at its release, by the same model."),
)
def champion_evaluation(bench: dg.ResourceParam[Workbench]) -> dg.MaterializeResult:
    """The live snapshot measured again each week, through the code and bytes that serving uses: MRR over time for each model."""
    report = detectors.evaluation_drift(bench)
    over_time = {f"mrr {report.facts['embedding_model']}": report.numbers["mrr"]} if "mrr" in report.numbers else {}
    return _result(report, "mrr_held", **over_time)


@asset(
    group_name="drift",
    kinds={"json"},
    pool="embedder",
    deps=[production_release],
    check_specs=_check(
        "vectors_as_stored", "embedding_drift", "The configured model gives the vectors that the index holds.", blocking=True
    ),
)
def embedding_drift(bench: dg.ResourceParam[Workbench]) -> dg.MaterializeResult:
    """Texts of the live snapshot embedded again by the model as it is configured now, against their stored vectors."""
    return _result(detectors.embedding_drift(bench), "vectors_as_stored")


@asset(
    group_name="drift",
    kinds={"json"},
    pool="embedder",
    deps=[production_release, eval_set],
    check_specs=_check("queries_as_at_release", "query_drift", "People ask what they asked when the release was new."),
)
def query_drift(bench: dg.ResourceParam[Workbench]) -> dg.MaterializeResult:
    """The queries of now against those kept at the release: MMD with a permutation p-value, and a classifier's AUC."""
    return _result(detectors.query_drift(bench), "queries_as_at_release")


@asset(
    group_name="drift",
    kinds={"json"},
    deps=[production_release, index_snapshot],
    check_specs=_check("corpus_as_released", "corpus_drift", "The newest corpus is about what the released one is about."),
)
def corpus_drift(bench: dg.ResourceParam[Workbench]) -> dg.MaterializeResult:
    """Passages of the newest snapshot against those of the live one, where one model embedded both."""
    return _result(detectors.corpus_drift(bench), "corpus_as_released")


@asset(
    group_name="drift",
    kinds={"json"},
    deps=[champion_evaluation],
    check_specs=_check(
        "index_sound", "index_health", "The live index is young, covers its rows, finds the nearest and shows varied results."
    ),
)
def index_health(bench: dg.ResourceParam[Workbench]) -> dg.MaterializeResult:
    """Age, coverage, recall and diversity of the live snapshot."""
    return _result(detectors.index_health(bench), "index_sound")
