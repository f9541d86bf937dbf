"""Measuring snapshots on the eval set, and comparing embedding models."""

from typing import Any

import dagster as dg

from evals.reports import leaderboard_markdown
from rag_assets import steps
from rag_assets.defs.corpus import documents
from rag_assets.defs.index import index_snapshot
from rag_assets.defs.resources import MODELS
from rag_assets.gating import standings
from rag_assets.leaderboard import leaderboard_rows
from rag_assets.workbench import Workbench


@dg.asset(
    group_name="evaluation",
    kinds={"json"},
    deps=[documents],
    check_specs=[dg.AssetCheckSpec("judgments_known", asset="eval_set", blocking=True, description="Judgments name documents that exist.")],
)
def eval_set(bench: dg.ResourceParam[Workbench]) -> dg.MaterializeResult:
    """Queries with relevance judgments, hashed; half for tuning, half held out."""
    loaded = steps.load_eval_set(bench)
    halves = {half: len(loaded.half(half).queries) for half in ("tune", "heldout")}
    facts: dict[str, Any] = {
        "dagster/row_count": len(loaded.queries),
        "sha256": loaded.sha256,
        "duplicate_texts": loaded.duplicate_texts,
        **halves,
    }
    check = dg.AssetCheckResult(check_name="judgments_known", passed=True, metadata={"queries": len(loaded.queries)})
    return dg.MaterializeResult(metadata=facts, data_version=dg.DataVersion(loaded.sha256), check_results=[check])


@dg.asset(
    group_name="evaluation",
    kinds={"mlflow"},
    partitions_def=MODELS,
    deps=[index_snapshot, eval_set],
    check_specs=[dg.AssetCheckSpec("mrr_floor", asset="retrieval_evaluation", blocking=True, description="MRR reaches the gate's floor.")],
)
def retrieval_evaluation(context: dg.AssetExecutionContext, bench: dg.ResourceParam[Workbench]) -> dg.MaterializeResult:
    """A snapshot measured through the code and bytes that serving uses; kept in the store, shown in MLflow."""
    measured = steps.measure_current(bench, context.partition_key, dagster_run_id=context.run_id)
    evaluation, floor = measured.evaluation, bench.settings.gate.mrr_floor
    facts: dict[str, Any] = {
        "snapshot_id": evaluation.snapshot_id,
        "reused": evaluation.reused,
        "ann_recall": evaluation.ann_recall,
        **evaluation.metrics,
    }
    facts |= {"mlflow": dg.MetadataValue.url(measured.tracked.url) if measured.tracked else "not reached; logged at the next run"}
    check = dg.AssetCheckResult(check_name="mrr_floor", passed=evaluation.mrr >= floor, metadata={"mrr": evaluation.mrr, "floor": floor})
    return dg.MaterializeResult(metadata=facts, check_results=[check])


@dg.asset(group_name="evaluation", deps=[retrieval_evaluation])
def model_leaderboard(bench: dg.ResourceParam[Workbench]) -> dg.MaterializeResult:
    """Every embedding model on the same corpus and eval set, best first."""
    rows = leaderboard_rows(standings(bench.store, steps.current_evaluations(bench, steps.load_eval_set(bench))))
    facts: dict[str, Any] = {
        "leaderboard": dg.MetadataValue.md(leaderboard_markdown(rows, k=bench.settings.eval.k)),
        "models": len(rows),
    }
    return dg.MaterializeResult(metadata=facts)
