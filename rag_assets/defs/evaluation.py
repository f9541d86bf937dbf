"""Measuring snapshots on the eval set, and comparing embedding models."""

import base64
from typing import Any

import dagster as dg

from evals.collections import EvalSet
from evals.plots import png, quality_latency_plot
from evals.regressions import regressions_markdown
from evals.reports import leaderboard_markdown
from rag_assets import steps
from rag_assets.background import require_uncontaminated
from rag_assets.comparison import compare_with_champion
from rag_assets.defs.corpus import documents
from rag_assets.defs.index import index_snapshot
from rag_assets.defs.resources import MODELS
from rag_assets.defs.traced import asset
from rag_assets.evaluation import Evaluation
from rag_assets.gating import standings
from rag_assets.leaderboard import leaderboard_rows
from rag_assets.mirror import mirror
from rag_assets.tracking import remember_dagster_run
from rag_assets.workbench import Workbench

_REGRESSIONS = 10


@asset(
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
        "ambiguous": len(loaded.ambiguous),
        "copied_from_corpus": len(require_uncontaminated(bench.store, loaded)),
        **halves,
    }
    check = dg.AssetCheckResult(check_name="judgments_known", passed=True, metadata={"queries": len(loaded.queries)})
    return dg.MaterializeResult(metadata=facts, data_version=dg.DataVersion(loaded.sha256), check_results=[check])


@asset(
    group_name="evaluation",
    kinds={"mlflow"},
    partitions_def=MODELS,
    deps=[index_snapshot, eval_set],
    check_specs=[dg.AssetCheckSpec("mrr_floor", asset="retrieval_evaluation", blocking=True, description="MRR reaches the gate's floor.")],
)
def retrieval_evaluation(context: dg.AssetExecutionContext, bench: dg.ResourceParam[Workbench]) -> dg.MaterializeResult:
    """A snapshot measured through the code and bytes that serving uses; kept in the store, shown in MLflow."""
    queries = steps.load_eval_set(bench)
    evaluation, floor = steps.measure_current(bench, context.partition_key, queries), bench.settings.gate.mrr_floor
    remember_dagster_run(bench.store, evaluation, context.run.run_id)
    facts = _numbers(evaluation) | _against_champion(bench, evaluation, queries) | _mlflow_links(bench, evaluation, queries)
    check = dg.AssetCheckResult(check_name="mrr_floor", passed=evaluation.mrr >= floor, metadata={"mrr": evaluation.mrr, "floor": floor})
    return dg.MaterializeResult(metadata=facts, check_results=[check])


def _numbers(evaluation: Evaluation) -> dict[str, Any]:
    """Metrics as metadata of their own, which the Dagster UI plots over time for each model."""
    return {"snapshot_id": evaluation.snapshot_id, "reused": evaluation.reused, "ann_recall": evaluation.ann_recall, **evaluation.metrics}


def _against_champion(bench: Workbench, evaluation: Evaluation, queries: EvalSet) -> dict[str, Any]:
    """What is lost and won against the live snapshot; nothing where there is none to compare with."""
    comparison = compare_with_champion(bench.store, evaluation, queries)
    if comparison is None:
        return {}
    worst = dg.MetadataValue.md(regressions_markdown(comparison.regressions[:_REGRESSIONS]))
    return {"champion": comparison.champion.snapshot_id, "mrr_difference_to_champion": comparison.mean, "worst_regressions": worst}


def _mlflow_links(bench: Workbench, evaluation: Evaluation, queries: EvalSet) -> dict[str, Any]:
    shown = mirror(bench, queries)
    if shown is None:
        return {"mlflow_run": "not reached; logged at the next run"}
    return {name: dg.MetadataValue.url(url) for name, url in shown.links(bench.settings, evaluation).items()}


@asset(group_name="evaluation", deps=[retrieval_evaluation])
def model_leaderboard(bench: dg.ResourceParam[Workbench]) -> dg.MaterializeResult:
    """Every embedding model on the same corpus and eval set, best first: quality with intervals, difference to the champion, speed, size."""
    found = standings(bench.store, steps.current_evaluations(bench, steps.load_eval_set(bench)))
    rows = leaderboard_rows(bench.store, found, alpha=bench.settings.gate.alpha)
    champion = next((standing.evaluation.snapshot_id for standing in found if standing.status == "champion"), None)
    figure = quality_latency_plot(rows, k=bench.settings.eval.k, champion=champion, floor=bench.settings.gate.mrr_floor)
    facts: dict[str, Any] = {
        "leaderboard": dg.MetadataValue.md(leaderboard_markdown(rows, k=bench.settings.eval.k)),
        "quality_against_latency": dg.MetadataValue.md(
            f"![MRR over latency](data:image/png;base64,{base64.b64encode(png(figure)).decode()})"
        ),
        "models": len(found),
        **{f"mrr {standing.evaluation.embedding_model}": standing.evaluation.mrr for standing in found},
    }
    return dg.MaterializeResult(metadata=facts)
