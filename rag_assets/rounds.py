"""Release rounds on a workbench: the current evaluations, a measured warm-up, and the ledger of its store."""

import asyncio
from datetime import UTC, datetime

from evals.collections import EvalSet
from rag_assets import steps
from rag_assets.evaluation import Evaluation, read_evaluation
from rag_assets.gating import Round, given_verdicts, judged, keep_verdict
from rag_assets.warmup import P95, WarmUp, warm_up, warm_up_gate
from rag_assets.workbench import Workbench
from rag_serving import promotion
from rag_serving.encoding import LocalEncoder, require_fingerprint
from rag_serving.errors import ConfigError, PromotionRefused, SnapshotError
from rag_serving.releases import Entry, Ledger, current_actor
from rag_serving.settings import Settings
from rag_serving.signals import contract, work
from rag_serving.snapshots import Manifest, read_manifest
from rag_serving.verdicts import RETRIEVAL_QUALITY, WARM_UP, Verdict, read_verdict, trusted_verdict

_PROBES = 200


def open_round(bench: Workbench) -> Round:
    """The round over the current evaluations of the configured eval set."""
    eval_set = steps.load_eval_set(bench)
    return Round(
        store=bench.store,
        evaluations=steps.current_evaluations(bench, eval_set),
        gate=bench.settings.gate,
        measured=lambda snapshot_id: steps.evaluate_snapshot(bench, read_manifest(bench.store, snapshot_id), eval_set),
        warm_up=lambda candidate: judge_warm_up(bench, candidate, eval_set),
        traffic=bench.settings.canary,
    )


def release_current(bench: Workbench) -> Entry | None:
    """Judge the current evaluations and promote the best that passes every gate and brings something."""
    return open_round(bench).promote_best(actor=current_actor(bench.settings.places.actor))


def current_verdicts(bench: Workbench, gate: str) -> dict[str, Verdict]:
    """What a gate says of the current snapshot of each configured model that reached it, on the configured eval set; by model name.

    The gates of the champion were passed before it went live, so its verdicts are those of its release.
    """
    found = {}
    for evaluation in steps.current_evaluations(bench, steps.load_eval_set(bench)):
        verdicts = {verdict.gate: verdict for verdict in given_verdicts(bench.store, evaluation)}
        if gate in verdicts:
            found[evaluation.embedding_model] = verdicts[gate]
    return found


@work.worked(contract.JUDGE, judged)
def judge_warm_up(bench: Workbench, candidate: Evaluation, eval_set: EvalSet) -> Verdict:
    """The warm-up verdict of a snapshot: the stored PASS while it is fresh and of the same limit, else measured and stored."""
    limit_ms = bench.settings.gate.warm_up_p95_ms
    stored = trusted_verdict(bench.store, candidate.snapshot_id, WARM_UP)
    if stored and _reusable(stored, candidate, limit_ms=limit_ms, max_age_days=bench.settings.gate.max_age_days):
        return stored
    bench.reporter.note(f"warming up {candidate.snapshot_id}")
    measured = asyncio.run(_measure(bench, read_manifest(bench.store, candidate.snapshot_id), eval_set, limit_ms=limit_ms))
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return keep_verdict(bench.store, warm_up_gate(measured, limit_ms=limit_ms), candidate, champion=None, measured_at=now)


def _reusable(verdict: Verdict, candidate: Evaluation, *, limit_ms: float, max_age_days: float) -> bool:
    bound = (verdict.manifest_sha256, verdict.eval_set_sha256) == (candidate.manifest_sha256, candidate.eval_set_sha256)
    required = {rule["name"]: rule["required"] for rule in verdict.rules}.get(P95)
    fresh = 0 <= verdict.age_days(datetime.now(UTC)) <= max_age_days / 2
    return verdict.outcome == "PASS" and bound and fresh and required == limit_ms


async def _measure(bench: Workbench, manifest: Manifest, eval_set: EvalSet, *, limit_ms: float) -> WarmUp:
    encoder = LocalEncoder(bench.model(manifest.embedding_model))
    try:
        require_fingerprint(encoder, manifest.fingerprint)
        vectors = await encoder.encode([query.text for query in eval_set.queries[:_PROBES]])
        return await warm_up(bench.store, manifest.snapshot_id, vectors, limit_ms=limit_ms)
    finally:
        await encoder.aclose()


def promote_named(settings: Settings, named: str, *, override: bool, allow_shrink: bool, reason: str) -> Entry | None:
    """Promote a snapshot by id or by model name; with no name, hold the release round over the current evaluations.

    One that passed retrieval quality against the champion gets its later verdicts first, where they are missing.
    """
    bench = Workbench(settings)
    if not named:
        if override or allow_shrink or reason:
            raise ConfigError(
                "--override, --allow-shrink and --reason are for one snapshot.", fix="Name it: `ragline promote SNAPSHOT ...`."
            )
        entry = release_current(bench)
        if entry is None and Ledger(bench.store).state().champion is None:
            raise PromotionRefused("no evaluated snapshot passes the gates.", fix="See why: `ragline run`.")
        return entry
    snapshot_id = named_snapshot(bench, named)
    if not override:
        _complete(bench, snapshot_id)
    return promotion.promote(
        bench.store,
        snapshot_id,
        gate=settings.gate,
        traffic=settings.canary,
        actor=current_actor(settings.places.actor),
        reason=reason or ("" if override else "promoted by hand"),
        override=override,
        allow_shrink=allow_shrink,
    )


def start_canary_named(settings: Settings, named: str, *, reason: str) -> Entry:
    """Name a snapshot the canary, by id or by model name; its warm-up is measured first, where it is missing."""
    bench = Workbench(settings)
    snapshot_id = named_snapshot(bench, named)
    _complete(bench, snapshot_id)
    actor = current_actor(settings.places.actor)
    return promotion.start_canary(bench.store, snapshot_id, gate=settings.gate, actor=actor, reason=reason)


def named_snapshot(bench: Workbench, named: str) -> str:
    """The id of a snapshot given by its id or by a model's name, whose newest it is; SnapshotError when that model has none."""
    if all(spec.name != named for spec in bench.settings.models):
        return named
    current = steps.current_snapshot(bench, named)
    if current is None:
        raise SnapshotError(f"there is no snapshot of {named} yet.", fix=f"Build one: `ragline run --models {named}`.")
    return current.snapshot_id


def _complete(bench: Workbench, snapshot_id: str) -> None:
    """Only what passed retrieval quality and is not held back has something to gain from the later gates."""
    verdict = read_verdict(bench.store, snapshot_id, RETRIEVAL_QUALITY)
    if verdict and verdict.outcome == "PASS" and not Ledger(bench.store).state().holds:
        evaluation = read_evaluation(bench.store, verdict.manifest_sha256, verdict.eval_set_sha256)
        if evaluation and evaluation.snapshot_id == snapshot_id:
            open_round(bench).complete(evaluation)
