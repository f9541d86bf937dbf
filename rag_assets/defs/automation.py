"""Jobs and schedules."""

from collections.abc import Iterator

import dagster as dg

from rag_assets.defs.corpus import chunks, documents, source_files
from rag_assets.defs.evaluation import eval_set, model_leaderboard, retrieval_evaluation
from rag_assets.defs.index import embeddings, index_snapshot
from rag_assets.defs.release import production_release
from rag_assets.defs.resources import MODELS, SETTINGS
from rag_assets.status import released_models

build_and_evaluate = dg.define_asset_job(
    "build_and_evaluate",
    selection=dg.AssetSelection.assets(source_files, documents, chunks, eval_set, embeddings, index_snapshot, retrieval_evaluation),
    partitions_def=MODELS,
    executor_def=dg.in_process_executor,
    tags={"ragline/heavy": "true"},
    description="From the source to an evaluated snapshot, for one embedding model.",
)

promote = dg.define_asset_job(
    "promote",
    selection=dg.AssetSelection.assets(model_leaderboard, production_release),
    executor_def=dg.in_process_executor,
    description="Compare the evaluated snapshots and promote the best that passes the gate.",
)


@dg.schedule(job=build_and_evaluate, cron_schedule="0 4 * * 1", default_status=dg.DefaultScheduleStatus.RUNNING)
def weekly_drift(context: dg.ScheduleEvaluationContext) -> Iterator[dg.RunRequest]:
    """Every Monday at 04:00: measure the default models and the released ones again, so that a falling MRR is seen within a week."""
    week = context.scheduled_execution_time.strftime("%G-W%V")
    for name in dict.fromkeys((*SETTINGS.default_models, *released_models(SETTINGS))):
        yield dg.RunRequest(run_key=f"{name}-{week}", partition_key=name)
