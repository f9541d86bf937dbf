"""What is live, and how it changes: the gates in their order, then the release."""

import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import dagster as dg

from evals.reports import leaderboard_markdown
from rag_assets import rounds, steps
from rag_assets.defs.evaluation import model_leaderboard
from rag_assets.defs.registry import mirror_release
from rag_assets.defs.resources import SETTINGS
from rag_assets.defs.traced import asset, asset_check, in_process, multi_asset_check, op
from rag_assets.explain import rules_markdown
from rag_assets.gating import standings
from rag_assets.leaderboard import leaderboard_rows
from rag_assets.workbench import Workbench
from rag_serving import promotion
from rag_serving.releases import Ledger, current_actor
from rag_serving.snapshots import verify
from rag_serving.verdicts import CANARY, RETRIEVAL_QUALITY, WARM_UP, Verdict


def _passable(gate: str, description: str) -> dg.AssetCheckSpec:
    return dg.AssetCheckSpec("something_passes", asset=gate, blocking=True, description=description)


def _gate_result(verdicts: Iterable[Verdict], *, passed: bool, damaged: Mapping[str, str] = MappingProxyType({})) -> dg.MaterializeResult:
    given = list(verdicts)
    facts: dict[str, Any] = {verdict.snapshot_id: verdict.summary for verdict in given} | dict(damaged)
    check = dg.AssetCheckResult(check_name="something_passes", passed=passed, metadata=facts)
    return dg.MaterializeResult(metadata={"judged": len(given), **facts}, check_results=[check])


@asset(
    group_name="release",
    deps=[model_leaderboard],
    check_specs=[_passable("quality_gate", "A snapshot of the current corpus is live or passes retrieval quality.")],
)
def quality_gate(bench: dg.ResourceParam[Workbench]) -> dg.MaterializeResult:
    """Retrieval quality of every evaluated snapshot, against the champion or the better snapshot that passed before it."""
    round_ = rounds.open_round(bench)
    verdicts = round_.judge_all().values()
    return _gate_result(verdicts, passed=round_.champion_is_current or any(verdict.outcome == "PASS" for verdict in verdicts))


@asset(
    group_name="release",
    deps=[quality_gate],
    check_specs=[_passable("warm_up_gate", "One of the snapshots that may go live answers fast once it is warm, or none has to.")],
)
def warm_up_gate(bench: dg.ResourceParam[Workbench]) -> dg.MaterializeResult:
    """The contenders opened as serving opens them, prewarmed, and searched until the p95 of the vector search is steady."""
    round_ = rounds.open_round(bench)
    verdicts = round_.warm_ups().values()
    passed = not verdicts or any(verdict.outcome == "PASS" for verdict in verdicts)
    return _gate_result(verdicts, passed=passed, damaged=round_.damaged)


@asset(
    group_name="release",
    deps=[warm_up_gate],
    check_specs=[_passable("canary", "One of the snapshots that may go live does no harm on real or replayed traffic, or none has to.")],
)
def canary(bench: dg.ResourceParam[Workbench]) -> dg.MaterializeResult:
    """Real requests that both answered, where the challenger was the canary, and the eval queries replayed through both, by a sequential test."""
    round_ = rounds.open_round(bench)
    verdicts = round_.canaries().values()
    passed = not verdicts or any(verdict.outcome == "PASS" for verdict in verdicts)
    return _gate_result(verdicts, passed=passed, damaged=round_.damaged)


def _model_checks(gate: str, asset: dg.AssetsDefinition) -> dg.AssetChecksDefinition:
    """A check a model that shows what the gate says of its current snapshot, rule by rule. It warns: a weaker model is refused, not broken."""
    names = {spec.name: re.sub(r"\W", "_", spec.name) for spec in SETTINGS.models}

    @multi_asset_check(
        name=f"{asset.key.to_user_string()}_by_model",
        specs=[dg.AssetCheckSpec(name, asset=asset, description=f"What the gate says of {model}.") for model, name in names.items()],
        can_subset=True,
    )
    def by_model(context: dg.AssetCheckExecutionContext, bench: dg.ResourceParam[Workbench]) -> Iterable[dg.AssetCheckResult]:
        selected = {key.name for key in context.selected_asset_check_keys}
        for model, verdict in rounds.current_verdicts(bench, gate).items():
            if names.get(model) in selected:
                facts: dict[str, Any] = {"outcome": verdict.outcome, "summary": verdict.summary, "snapshot_id": verdict.snapshot_id}
                facts |= {"compared_with": verdict.champion or "nothing", "rules": dg.MetadataValue.md(rules_markdown(verdict.rules))}
                facts |= {rule["name"]: float(rule["observed"]) for rule in verdict.rules}
                passed = verdict.outcome == "PASS"
                yield dg.AssetCheckResult(check_name=names[model], passed=passed, severity=dg.AssetCheckSeverity.WARN, metadata=facts)

    return by_model


quality_gate_by_model = _model_checks(RETRIEVAL_QUALITY, quality_gate)
warm_up_gate_by_model = _model_checks(WARM_UP, warm_up_gate)
canary_by_model = _model_checks(CANARY, canary)


@asset(group_name="release", deps=[canary])
def production_release(bench: dg.ResourceParam[Workbench]) -> dg.MaterializeResult:
    """The snapshot the ledger names. The best candidate that passed every gate is promoted, its evidence verified again at that moment."""
    entry = rounds.release_current(bench)
    live = Ledger(bench.store).state()
    found = standings(bench.store, steps.current_evaluations(bench, steps.load_eval_set(bench)))
    rows = leaderboard_rows(bench.store, found, alpha=bench.settings.gate.alpha)
    facts: dict[str, Any] = {
        "release": live.champion.number if live.champion else 0,
        "champion": live.champion.snapshot_id if live.champion else "none",
    }
    facts |= {"promoted": entry is not None, "standings": dg.MetadataValue.md(leaderboard_markdown(rows, k=bench.settings.eval.k))}
    return dg.MaterializeResult(metadata=facts)


@asset_check(asset=production_release, description="The live snapshot is on disk as it was released, every byte.")
def live_snapshot_intact(bench: dg.ResourceParam[Workbench]) -> dg.AssetCheckResult:
    live = Ledger(bench.store).state().champion
    manifest = verify(bench.store, live.snapshot_id) if live else None
    return dg.AssetCheckResult(passed=manifest is None or (live is not None and manifest.sha256 == live.manifest_sha256))


@asset_check(asset=production_release, description="The live release rests on verdicts, or on an override that has not expired.")
def rests_on_evidence(bench: dg.ResourceParam[Workbench]) -> dg.AssetCheckResult:
    live = Ledger(bench.store).state().champion
    override = promotion.override_of(bench.store, live) if live else None
    stands_on = f"an override until {override.expires_at}" if override else "verdicts"
    facts: dict[str, Any] = {"release": live.number if live else 0, "stands_on": stands_on}
    return dg.AssetCheckResult(passed=not (override and override.expired), severity=dg.AssetCheckSeverity.WARN, metadata=facts)


class RollbackConfig(dg.Config):
    reason: str
    to: str | None = None
    champion: str | None = None
    actor: str | None = None


@op()
def restore_previous(context: dg.OpExecutionContext, config: RollbackConfig, bench: dg.ResourceParam[Workbench]) -> None:
    """Make the previous snapshot live again."""
    actor = config.actor or current_actor(bench.settings.places.actor)
    entry = promotion.rollback(bench.store, actor=actor, reason=config.reason, to=config.to, champion=config.champion)
    context.log.info("release %d: %s is live again", entry.number, entry.snapshot_id)


@dg.job(executor_def=in_process)
def rollback() -> None:
    """Restore the previous snapshot; the serving processes follow within a second."""
    mirror_release(changed=restore_previous())
