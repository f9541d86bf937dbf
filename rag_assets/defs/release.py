"""What is live, and how it changes."""

import dagster as dg

from rag_assets import steps
from rag_assets.defs.evaluation import model_leaderboard
from rag_assets.workbench import Workbench
from rag_serving import promotion
from rag_serving.releases import Ledger, current_actor


@dg.asset(group_name="release", deps=[model_leaderboard])
def production_release(bench: dg.ResourceParam[Workbench]) -> dg.MaterializeResult[None]:
    """The snapshot the ledger names. Every candidate is judged, and the best that passes the gate is promoted, re-verified at that moment."""
    decision = steps.release_current(bench)
    live = Ledger(bench.store).state()
    lines = [f"| {s.evaluation.embedding_model} | {s.status} | {s.reason} |" for s in decision.standings]
    table = "\n".join(["| embedding model | status | reason |", "|---|---|---|", *lines])
    facts: dict[str, object] = {"release": live.number, "champion": live.champion.snapshot_id if live.champion else "none"}
    facts |= {"promoted": decision.entry is not None, "standings": dg.MetadataValue.md(table)}
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
