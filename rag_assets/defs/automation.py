"""Jobs and schedules."""

from collections.abc import Iterator

import dagster as dg

from rag_assets.defs.corpus import chunks, documents, source_files
from rag_assets.defs.drift import champion_evaluation, corpus_drift, embedding_drift, index_health, query_drift
from rag_assets.defs.evaluation import eval_set, model_leaderboard, retrieval_evaluation
from rag_assets.defs.index import embeddings, index_snapshot
from rag_assets.defs.registry import model_registry
from rag_assets.defs.release import canary, production_release, quality_gate, warm_up_gate
from rag_assets.defs.resources import SETTINGS
from rag_assets.defs.traced import in_process
from rag_assets.status import released_models

build = dg.define_asset_job(
    "build",
    selection=dg.AssetSelection.assets(source_files, documents, chunks, embeddings, index_snapshot),
    executor_def=in_process,
    tags={"ragline/heavy": "true"},
    description="From the source to a snapshot that nobody measured, for one embedding model: for a corpus without an eval set.",
)

build_and_evaluate = dg.define_asset_job(
    "build_and_evaluate",
    selection=dg.AssetSelection.assets(source_files, documents, chunks, eval_set, embeddings, index_snapshot, retrieval_evaluation),
    executor_def=in_process,
    tags={"ragline/heavy": "true"},
    description="From the source to an evaluated snapshot, for one embedding model.",
)

promote = dg.define_asset_job(
    "promote",
    selection=dg.AssetSelection.assets(model_leaderboard, quality_gate, warm_up_gate, canary, production_release, model_registry),
    executor_def=in_process,
    description="Put the evaluated snapshots through the gates, best first, and promote the first that passes them all.",
)


drift = dg.define_asset_job(
    "weekly_drift",
    selection=dg.AssetSelection.assets(champion_evaluation, embedding_drift, query_drift, corpus_drift, index_health, model_registry),
    executor_def=in_process,
    tags={"ragline/heavy": "true"},
    description="What is live, measured afresh: its evaluation, its vectors, the queries, the corpus, the index.",
)


@dg.schedule(job=build_and_evaluate, cron_schedule="0 2 * * 1", default_status=dg.DefaultScheduleStatus.RUNNING)
def weekly_build(context: dg.ScheduleEvaluationContext) -> Iterator[dg.RunRequest]:
    """Every Monday at 02:00: the newest corpus, built and measured for the default models and the released ones."""
    week = _week(context)
    for name in dict.fromkeys((*SETTINGS.default_models, *released_models(SETTINGS))):
        yield dg.RunRequest(run_key=f"{name}-{week}", partition_key=name)


@dg.schedule(job=drift, cron_schedule="0 4 * * 1", default_status=dg.DefaultScheduleStatus.RUNNING)
def weekly_drift(context: dg.ScheduleEvaluationContext) -> dg.RunRequest:
    """Every Monday at 04:00: whether the release still is what it was, so that a falling MRR or another model is seen within a week."""
    return dg.RunRequest(run_key=_week(context))


def _week(context: dg.ScheduleEvaluationContext) -> str:
    return context.scheduled_execution_time.strftime("%G-W%V")
