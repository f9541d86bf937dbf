"""What is live, and how it changes."""

from typing import Any

import dagster as dg

from evals.reports import leaderboard_markdown
from rag_assets import steps
from rag_assets.defs.evaluation import model_leaderboard
from rag_assets.gating import standings
from rag_assets.leaderboard import leaderboard_rows
from rag_assets.workbench import Workbench
from rag_serving import promotion
from rag_serving.releases import Ledger, current_actor


@dg.asset(group_name="release", deps=[model_leaderboard])
def production_release(bench: dg.ResourceParam[Workbench]) -> dg.MaterializeResult:
    """The snapshot the ledger names. Every candidate is judged, and the best that passes the gate is promoted, re-verified at that moment."""
    entry = steps.release_current(bench)
    live = Ledger(bench.store).state()
    rows = leaderboard_rows(standings(bench.store, steps.current_evaluations(bench, steps.load_eval_set(bench))))
    facts: dict[str, Any] = {
        "release": live.champion.number if live.champion else 0,
        "champion": live.champion.snapshot_id if live.champion else "none",
    }
    facts |= {"promoted": entry is not None, "standings": dg.MetadataValue.md(leaderboard_markdown(rows, k=bench.settings.eval.k))}
    return dg.MaterializeResult(metadata=facts)


class RollbackConfig(dg.Config):
    reason: str
    to: str | None = None


@dg.op
def restore_previous(context: dg.OpExecutionContext, config: RollbackConfig, bench: dg.ResourceParam[Workbench]) -> None:
    """Make the previous snapshot live again."""
    entry = promotion.rollback(bench.store, actor=current_actor(bench.settings.places.actor), reason=config.reason, to=config.to)
    context.log.info("release %d: %s is live again", entry.number, entry.snapshot_id)


@dg.job(executor_def=dg.in_process_executor)
def rollback() -> None:
    """Restore the previous snapshot; the serving processes follow within a second."""
    restore_previous()
