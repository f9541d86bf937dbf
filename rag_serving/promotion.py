"""Moving the release: promote, roll back, hold and lift. Every promotion re-verifies its evidence here, however it was started."""

from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime

from rag_serving.errors import NoPrevious, PromotionRefused, ReleaseError
from rag_serving.releases import Action, Entry, Ledger, State
from rag_serving.settings import Gate
from rag_serving.snapshots import Manifest, read_manifest, verify
from rag_serving.store import Store
from rag_serving.verdicts import RETRIEVAL_QUALITY, Verdict, read_verdict


def promote(
    store: Store,
    snapshot_id: str,
    *,
    gate: Gate,
    actor: str,
    reason: str,
    override: bool = False,
    allow_shrink: bool = False,
    now: datetime | None = None,
) -> Entry | None:
    """Make `snapshot_id` the champion. None when it already is.

    Refused (PromotionRefused) without a fresh PASS verdict of this manifest against the present champion, during a hold, or when the corpus
    shrank beyond the guard; a damaged snapshot is a SnapshotError. `override` skips the verdict and nothing else, and needs a reason;
    `allow_shrink` skips the guard. The entry records both.
    """
    ledger = Ledger(store)
    state = ledger.state()
    manifest = verify(store, snapshot_id)
    if state.champion and state.champion.snapshot_id == snapshot_id:
        return None
    if state.holds:
        hold = state.holds[-1]
        raise PromotionRefused(
            f"a hold blocks every promotion: entry {hold.number} by {hold.actor}, {hold.reason!r}.",
            fix="Lift it with `ragline lift --reason`.",
        )
    verdict: Verdict | None = None
    if override:
        if not (reason.strip() and actor.strip()):
            raise PromotionRefused("an override needs a reason and an actor.", fix="Give --reason; RAGLINE_ACTOR says who acts.")
        with suppress(PromotionRefused):
            verdict = read_verdict(store, snapshot_id, RETRIEVAL_QUALITY)
    else:
        verdict = read_verdict(store, snapshot_id, RETRIEVAL_QUALITY)
        _check_verdict(verdict, manifest, state, gate, now or datetime.now(UTC))
    if not allow_shrink:
        _check_shrink(store, manifest, state, gate)
    return ledger.append(
        Action.PROMOTE,
        after=state.number,
        actor=actor,
        reason=reason,
        snapshot_id=snapshot_id,
        manifest_sha256=manifest.sha256,
        evidence={"override": override, "allow_shrink": allow_shrink, "verdict": asdict(verdict) if verdict else None},
    )


def _check_verdict(verdict: Verdict | None, manifest: Manifest, state: State, gate: Gate, now: datetime) -> None:
    snapshot_id = manifest.snapshot_id
    evaluate = "Evaluate it again: `ragline run`."
    if verdict is None:
        raise PromotionRefused(f"{snapshot_id} has no retrieval quality verdict.", fix=evaluate)
    if verdict.manifest_sha256 != manifest.sha256 or verdict.snapshot_id != snapshot_id:
        raise PromotionRefused(f"the verdict of {snapshot_id} belongs to another snapshot.", fix=evaluate)
    if verdict.outcome != "PASS":
        raise PromotionRefused(verdict.summary, fix="Improve it, or override with --override --reason.")
    age = verdict.age_days(now)
    if not 0 <= age <= gate.max_age_days:
        raise PromotionRefused(f"the verdict of {snapshot_id} is {age:.1f} days old; {gate.max_age_days:g} are allowed.", fix=evaluate)
    champion = state.champion.snapshot_id if state.champion else None
    if verdict.champion != champion:
        raise PromotionRefused(f"{snapshot_id} was compared with {verdict.champion}, but {champion} is live now.", fix=evaluate)


def _check_shrink(store: Store, manifest: Manifest, state: State, gate: Gate) -> None:
    if state.champion is None:
        return
    rows = read_manifest(store, state.champion.snapshot_id).rows
    if manifest.rows < rows * (1 - gate.max_shrink):
        raise PromotionRefused(
            f"{manifest.snapshot_id} has {manifest.rows} rows, the champion {rows}: more than {gate.max_shrink:.0%} fewer.",
            fix="Check the source, or promote with --allow-shrink.",
        )


def rollback(store: Store, *, actor: str, reason: str, to: str | None = None) -> Entry:
    """Make the previous snapshot (or an earlier one, by `to`) live again. It needs no verdict: it was live before. Holds do not block it."""
    ledger = Ledger(store)
    state = ledger.state()
    earlier = {release.snapshot_id: release for release in state.line[:-1]}
    if not earlier:
        raise NoPrevious("there is no earlier release to roll back to.", fix="Look at `ragline releases`.")
    target = to or state.line[-2].snapshot_id
    if target not in earlier:
        raise NoPrevious(f"{target} is not an earlier release.", fix=f"Choose one of: {', '.join(earlier)}.")
    manifest = verify(store, target)
    if manifest.sha256 != earlier[target].manifest_sha256:
        raise NoPrevious(f"{target} is not the snapshot that was released.", fix="Restore it from a backup.")
    return ledger.append(
        Action.ROLLBACK,
        after=state.number,
        actor=actor,
        reason=reason,
        snapshot_id=target,
        manifest_sha256=manifest.sha256,
        evidence={"from": state.line[-1].snapshot_id},
    )


def hold(store: Store, *, actor: str, reason: str) -> Entry:
    """Make every promotion refuse until lifted."""
    return _mark(store, Action.HOLD, actor=actor, reason=reason)


def lift(store: Store, *, actor: str, reason: str) -> Entry:
    """End all holds."""
    if not Ledger(store).state().holds:
        raise ReleaseError("there is no hold to lift.", fix="Look at `ragline status`.")
    return _mark(store, Action.LIFT, actor=actor, reason=reason)


def _mark(store: Store, action: Action, *, actor: str, reason: str) -> Entry:
    if not reason.strip():
        raise ReleaseError(f"a {action} needs a reason.", fix="Give --reason.")
    ledger = Ledger(store)
    return ledger.append(action, after=ledger.last_number(), actor=actor, reason=reason)
