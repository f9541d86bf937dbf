"""The weekly rehearsal of a rollback."""

from typing import Any

import dagster as dg

from rag_assets.defs.release import production_release
from rag_assets.defs.traced import asset, in_process
from rag_assets.drill import drill_facts, run_drill
from rag_assets.workbench import Workbench


@asset(group_name="release", deps=[production_release])
def rollback_drill(bench: dg.ResourceParam[Workbench]) -> dg.MaterializeResult:
    """The previous snapshot, made live on a scratch store and asked probe queries: proof that a rollback works, with its seconds."""
    drill = run_drill(bench)
    facts: dict[str, Any] = drill_facts(drill) if drill else {"outcome": "nothing to roll back to yet"}
    return dg.MaterializeResult(metadata={**facts, "budget_seconds": bench.settings.drift.drill_budget_seconds})


drill = dg.define_asset_job(
    "drill",
    selection=dg.AssetSelection.assets(rollback_drill),
    executor_def=in_process,
    description="Rehearse the rollback to the previous snapshot on a scratch store.",
)


@dg.schedule(job=drill, cron_schedule="0 6 * * 1", default_status=dg.DefaultScheduleStatus.RUNNING)
def weekly_drill(context: dg.ScheduleEvaluationContext) -> dg.RunRequest:
    """Every Monday at 06:00, after the weekly drift job."""
    return dg.RunRequest(run_key=context.scheduled_execution_time.strftime("%G-W%V"))
