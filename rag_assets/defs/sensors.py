"""What watches between runs: drift places holds, silence places one, harm ends a canary, and the ledger is shown and told."""

import json

import dagster as dg

from rag_assets.alerts import Alert, Severity, send
from rag_assets.defs.automation import drift
from rag_assets.defs.drill import drill
from rag_assets.defs.release import RollbackConfig, rollback
from rag_assets.defs.traced import asset_check
from rag_assets.defs.watched import sensor
from rag_assets.holds import due_rollback, hold_findings, hold_missed_week
from rag_assets.observations import tidy
from rag_assets.release_log import release_facts, tell
from rag_assets.trial import abort_harmful, harm, harm_alert
from rag_assets.workbench import Workbench
from rag_serving.releases import Ledger

RUNNING = dg.DefaultSensorStatus.RUNNING
NO_HOLD = dg.AssetCheckKey(dg.AssetKey("release_ledger"), "no_hold")

release_ledger = dg.AssetSpec(
    "release_ledger",
    group_name="release",
    kinds={"json"},
    description="The release ledger: what is live, what is held and by whom, and why.",
)


@asset_check(
    asset=NO_HOLD.asset_key, name=NO_HOLD.name, description="Nothing is held, so a snapshot that passes its gates may be promoted."
)
def no_hold(bench: dg.ResourceParam[Workbench]) -> dg.AssetCheckResult:
    facts = release_facts(bench.store)
    return dg.AssetCheckResult(passed=not facts["held"], metadata={name: facts[name] for name in ("held", "held_by")})


@sensor(job_name=rollback.name, minimum_interval_seconds=30, default_status=RUNNING)
def drift_holds(bench: dg.ResourceParam[Workbench]) -> dg.SensorResult:
    """A hold for every new finding that asks for one; a rollback where the champion fell below the floor and ragline.toml says so."""
    placed = hold_findings(bench.store, actor="drift_holds sensor")
    due = due_rollback(bench.store) if bench.settings.drift.automatic_rollback else None
    if due:
        asked = RollbackConfig(reason=f"automatic: {due.reason}", to=due.target, champion=due.champion, actor="drift_holds sensor")
        config = dg.RunConfig(ops={"restore_previous": asked})
        return dg.SensorResult(run_requests=[dg.RunRequest(run_key=due.key, run_config=config)])
    return dg.SensorResult(skip_reason="; ".join(f"entry {entry.number}: {entry.reason}" for entry in placed) or "no new finding holds")


@sensor(minimum_interval_seconds=3600, default_status=RUNNING)
def missed_week(bench: dg.ResourceParam[Workbench]) -> dg.SensorResult:
    """A hold when no weekly run was complete for more than 8 days, since a silent watch proves nothing."""
    entry = hold_missed_week(bench.store, actor="missed_week sensor")
    return dg.SensorResult(
        skip_reason=f"entry {entry.number}: {entry.reason}" if entry else "the weekly run is not overdue, or held already"
    )


@sensor(minimum_interval_seconds=30, default_status=RUNNING)
def canary_watch(context: dg.SensorEvaluationContext, bench: dg.ResourceParam[Workbench]) -> dg.SensorResult:
    """The end of a canary that real traffic shows to do harm, written in the ledger; or an alert where ragline.toml leaves the end to people."""
    settings, alpha = bench.settings.canary, bench.settings.gate.alpha
    if settings.automatic_abort:
        entry = abort_harmful(bench.store, settings, alpha=alpha, actor="canary_watch sensor")
        return dg.SensorResult(skip_reason=f"entry {entry.number}: {entry.reason}" if entry else "no canary is shown to do harm")
    shown = harm(bench.store, settings, alpha=alpha)
    if shown is None or context.cursor == str(shown.trial.entry.number):
        return dg.SensorResult(skip_reason="told already" if shown else "no canary is shown to do harm", cursor=context.cursor)
    told = send(bench.settings, harm_alert(shown))
    return dg.SensorResult(skip_reason=shown.reason, cursor=str(shown.trial.entry.number) if told else context.cursor)


@sensor(minimum_interval_seconds=3600, default_status=RUNNING)
def observation_log(bench: dg.ResourceParam[Workbench]) -> dg.SensorResult:
    """The observation log kept small: an hour that is over becomes one part, and days beyond `canary.keep_days` go."""
    gone = tidy(bench.store, keep_days=bench.settings.canary.keep_days)
    return dg.SensorResult(skip_reason=f"{gone} parts were merged or taken away")


@sensor(minimum_interval_seconds=15, default_status=RUNNING)
def releases(context: dg.SensorEvaluationContext, bench: dg.ResourceParam[Workbench]) -> dg.SensorResult:
    """Show the ledger on `release_ledger` whenever it has grown, and send an alert for each new entry."""
    entries = Ledger(bench.store).entries()
    seen = json.loads(context.cursor) if context.cursor else {"shown": 0, "told": 0}
    told = tell(bench.settings, entries, told=min(seen["told"], len(entries)))
    cursor = json.dumps({"shown": len(entries), "told": told})
    grown = len(entries) != seen["shown"]
    events = ledger_events(bench) if grown else []
    return dg.SensorResult(
        skip_reason=f"the ledger is at entry {len(entries)}{', shown now' if grown else ''}", cursor=cursor, asset_events=events
    )


def ledger_events(bench: Workbench) -> list[dg.AssetMaterialization | dg.AssetObservation | dg.AssetCheckEvaluation]:
    """The ledger as it stands now, as events of the asset that shows it."""
    facts = release_facts(bench.store)
    shown = facts | {name: dg.MetadataValue.md(facts[name]) for name in ("holds", "history")}
    held = {name: shown[name] for name in ("held", "held_by")}
    check = dg.AssetCheckEvaluation(asset_key=NO_HOLD.asset_key, check_name=NO_HOLD.name, passed=not facts["held"], metadata=held)
    return [dg.AssetMaterialization(NO_HOLD.asset_key, metadata=shown), check]


@dg.run_failure_sensor(monitored_jobs=[rollback, drill, drift], minimum_interval_seconds=30, default_status=RUNNING)
def failed_runs(context: dg.RunFailureSensorContext, bench: dg.ResourceParam[Workbench]) -> None:
    """An alert when a rollback, a drill or a weekly run fails: they protect what is live."""
    job, run_id = context.dagster_run.job_name, context.dagster_run.run_id
    causes = [event.step_failure_data.error for event in context.get_step_failure_events() if event.step_failure_data.error]
    text = next((str((cause.cause or cause).message).strip() for cause in causes), context.failure_event.message or "no message")
    send(bench.settings, Alert("run_failed", Severity.CRITICAL, f"Run of {job} failed: {text}", {"job": job, "run_id": run_id}))
