"""Moving the release: promote, try as canary, roll back, hold, lift, pin. Every promotion re-verifies its evidence here, however it was started."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from rag_serving.errors import NoPrevious, PromotionRefused, ReleaseConflict, ReleaseError, SnapshotError
from rag_serving.refusals import remembering
from rag_serving.releases import Action, Entry, Ledger, Release, State
from rag_serving.settings import Canary, Gate
from rag_serving.signals import contract, work
from rag_serving.snapshots import Manifest, read_manifest, verify
from rag_serving.store import Store
from rag_serving.verdicts import GATES, RETRIEVAL_QUALITY, WARM_UP, Verdict, passed, require_pass, trusted_verdict

_CEILING = "vector_search_p95"  # of the gates' rules the one whose number is the most that is allowed
_ERROR_RATE = "no_harm"  # the one whose number is 1 / alpha; more of it is easier for one gate and harder for another
_REAL = "real_"  # begins the names of rules on real traffic
_AS_DEFAULT = Canary()


@dataclass(frozen=True, slots=True)
class Override:
    """What a release stands on that was promoted without verdicts: until when (ISO time), and whether that is over."""

    number: int
    expires_at: str
    expired: bool


def _changed(entry: Entry | None) -> work.Facts:
    return {contract.SNAPSHOT_ID: entry.snapshot_id, contract.GENERATION: entry.number} if entry and entry.snapshot_id else {}


@work.worked(contract.PROMOTE, _changed)
def promote(
    store: Store,
    snapshot_id: str,
    *,
    gate: Gate,
    actor: str,
    reason: str,
    traffic: Canary = _AS_DEFAULT,
    override: bool = False,
    allow_shrink: bool = False,
    now: datetime | None = None,
) -> Entry | None:
    """Make `snapshot_id` the champion. None when it already is. `gate` and `traffic` are the terms of today.

    Refused (PromotionRefused, whose code names the reason) without a fresh PASS of every gate for this manifest against the present champion,
    during a hold, or when the corpus shrank beyond the guard; a damaged snapshot is a SnapshotError, another writer at the same moment a
    ReleaseConflict. `override` skips the verdicts and nothing else, needs a reason and an actor, and expires after `gate.override_hours`;
    while the live release stands on an expired one, another is refused. `allow_shrink` skips the guard. The entry records both. The store
    remembers the last refusal.
    """
    with remembering(store, snapshot_id, actor=actor):
        now = now or datetime.now(UTC)
        ledger = Ledger(store)
        state = ledger.state()
        manifest = verify(store, snapshot_id)
        if state.champion and state.champion.snapshot_id == snapshot_id:
            return None
        _check_free(state, snapshot_id)
        if override:
            verdicts = _overridden(store, state, manifest, actor=actor, reason=reason, now=now)
        else:
            verdicts = _required(store, state, manifest, GATES, gate=gate, traffic=traffic, now=now)
        if not allow_shrink:
            _check_shrink(store, manifest, state, gate)
        ends = (now + timedelta(hours=gate.override_hours)).isoformat(timespec="seconds")
        instead_of = state.champion.snapshot_id if state.champion else None
        terms = {"override_expires_at": ends, "champion": instead_of} if override else {}
        return ledger.append(
            Action.PROMOTE,
            after=state.number,
            actor=actor,
            reason=reason,
            snapshot_id=snapshot_id,
            manifest_sha256=manifest.sha256,
            evidence={"override": override, **terms, "allow_shrink": allow_shrink, **_as_evidence(verdicts)},
        )


def start_canary(store: Store, snapshot_id: str, *, gate: Gate, actor: str, reason: str, now: datetime | None = None) -> Entry:
    """Name `snapshot_id` the canary, beside the champion. It needs fresh PASS verdicts of retrieval quality and warm-up; refusals as in `promote`.

    It needs a reason. A canary ends by promotion of any snapshot, by rollback or by `abort`; only one runs at a time.
    """
    _require_reason(Action.CANARY, reason)
    ledger = Ledger(store)
    state = ledger.state()
    manifest = verify(store, snapshot_id)
    if state.champion is None or state.champion.snapshot_id == snapshot_id:
        live = "it is live" if state.champion else "nothing is live to compare with"
        raise ReleaseError(f"{snapshot_id} cannot be a canary: {live}.", fix="Promote it, or name another snapshot.")
    if state.canary:
        raise ReleaseError(f"{state.canary.snapshot_id} is the canary already.", fix="Promote it, or end it with `ragline abort --reason`.")
    _check_free(state, snapshot_id)
    gates = (RETRIEVAL_QUALITY, WARM_UP)
    verdicts = _required(store, state, manifest, gates, gate=gate, traffic=_AS_DEFAULT, now=now or datetime.now(UTC))
    _check_shrink(store, manifest, state, gate)
    return ledger.append(
        Action.CANARY,
        after=state.number,
        actor=actor,
        reason=reason,
        snapshot_id=snapshot_id,
        manifest_sha256=manifest.sha256,
        evidence={"champion": state.champion.snapshot_id, **_as_evidence(verdicts)},
    )


def abort(store: Store, *, actor: str, reason: str, evidence: Mapping[str, Any] | None = None, canary: int | None = None) -> Entry:
    """End the canary; the champion stays live, so nothing is restored. `evidence` holds the numbers that spoke against it.

    With `canary`, only the one of that ledger entry: what was decided about one must not end another (ReleaseConflict).
    """
    state = Ledger(store).state()
    if state.canary is None:
        raise ReleaseError("there is no canary to abort.", fix="Look at `ragline status`.")
    if canary is not None and state.canary.number != canary:
        raise ReleaseConflict(f"the canary of entry {canary} has ended.", fix="Look at `ragline releases`.")
    named = {"canary": state.canary.snapshot_id, **(evidence or {})}
    return _mark(store, Action.ABORT, after=state.number, actor=actor, reason=reason, evidence=named)


def override_of(store: Store, release: Release, *, now: datetime | None = None) -> Override | None:
    """The override that a release stands on; None when it was promoted by verdicts, or passed every gate against its champion after all."""
    champion = release.evidence.get("champion")
    if not release.evidence.get("override") or passed(store, release.snapshot_id, release.manifest_sha256, champion=champion):
        return None
    expires_at = str(release.evidence["override_expires_at"])
    return Override(release.number, expires_at, (now or datetime.now(UTC)) >= datetime.fromisoformat(expires_at))


def _check_free(state: State, snapshot_id: str) -> None:
    if state.holds:
        hold = state.holds[-1]
        raise PromotionRefused(
            f"a hold blocks every promotion: entry {hold.number} by {hold.actor}, {hold.reason!r}.",
            fix="Lift it with `ragline lift --reason`.",
            code="held",
        )
    if snapshot_id in state.collected:
        raise PromotionRefused(
            f"{snapshot_id} was given up by `ragline gc`.", fix="Finish that with `ragline gc`, then build it again.", code="collected"
        )


def _required(
    store: Store, state: State, manifest: Manifest, gates: Sequence[str], *, gate: Gate, traffic: Canary, now: datetime
) -> list[Verdict]:
    champion = state.champion.snapshot_id if state.champion else None
    verdicts = [
        require_pass(
            store,
            name,
            snapshot_id=manifest.snapshot_id,
            manifest_sha256=manifest.sha256,
            champion=champion,
            max_age_days=gate.max_age_days,
            now=now,
        )
        for name in gates
    ]
    if len({verdict.eval_set_sha256 for verdict in verdicts}) > 1:
        raise PromotionRefused(
            f"the verdicts of {manifest.snapshot_id} were given on different eval sets.",
            fix="Run the gates again: `ragline run`.",
            code="verdict_foreign",
        )
    for verdict in verdicts:
        _check_terms(verdict, gate, traffic)
    return verdicts


def _check_terms(verdict: Verdict, gate: Gate, traffic: Canary) -> None:
    """Refuse a verdict that was given on easier terms than today's, or at another alpha; rules that are not named here have no setting."""
    asked = {
        "enough_queries": gate.min_queries,
        "enough_traffic": gate.min_queries,
        "non_inferiority": -gate.margin,
        "no_slice_worse": -gate.slice_margin,
        "mrr_floor": gate.mrr_floor,
        "ann_recall": gate.ann_recall_floor,
        _CEILING: gate.warm_up_p95_ms,
        _ERROR_RATE: 1 / gate.alpha,
    }
    for rule in verdict.rules:
        name, required = rule["name"], rule["required"]
        now = -traffic.margin if name.startswith(_REAL) else asked.get(name, required)
        if _easier(name, required, now):
            raise PromotionRefused(
                f"the {verdict.gate.replace('_', ' ')} verdict of {verdict.snapshot_id} was given with {name} at {required:g}; "
                f"the gate asks for {now:g} now.",
                fix="Run the gates again: `ragline run`.",
                code="verdict_outdated",
            )


def _easier(name: str, required: float, now: float) -> bool:
    if name == _ERROR_RATE:
        return not math.isclose(required, now)
    return required > now if name == _CEILING else required < now


def _overridden(store: Store, state: State, manifest: Manifest, *, actor: str, reason: str, now: datetime) -> list[Verdict]:
    if not (reason.strip() and actor.strip()):
        raise PromotionRefused(
            "an override needs a reason and an actor.", fix="Give --reason; RAGLINE_ACTOR says who acts.", code="override_incomplete"
        )
    standing = override_of(store, state.champion, now=now) if state.champion else None
    if standing and standing.expired:
        raise PromotionRefused(
            f"release {standing.number} stands on an override that expired at {standing.expires_at}; another is not accepted.",
            fix="Promote a snapshot that passes, roll back, or let the gates judge the release: `ragline run`.",
            code="override_expired",
        )
    found = [trusted_verdict(store, manifest.snapshot_id, name) for name in GATES]
    return [verdict for verdict in found if verdict]


def _as_evidence(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Verdicts under the name of their gate; retrieval quality, which every release rests on, is `verdict`."""
    given = {verdict.gate: asdict(verdict) for verdict in verdicts}
    return {"verdict": given.pop(RETRIEVAL_QUALITY, None), **given}


def _check_shrink(store: Store, manifest: Manifest, state: State, gate: Gate) -> None:
    if state.champion is None:
        return
    rows = read_manifest(store, state.champion.snapshot_id).rows
    if manifest.rows < rows * (1 - gate.max_shrink):
        raise PromotionRefused(
            f"{manifest.snapshot_id} has {manifest.rows} rows, the champion {rows}: more than {gate.max_shrink:.0%} fewer.",
            fix="Check the source, or promote with --allow-shrink.",
            code="corpus_shrunk",
        )


@work.worked(contract.ROLL_BACK, _changed)
def rollback(store: Store, *, actor: str, reason: str, to: str | None = None, champion: str | None = None) -> Entry:
    """Make the previous snapshot (or an earlier one, by `to`) live again. It needs no verdict: it was live before. Holds do not block it.

    With `champion`, only while that snapshot is still live: a rollback that waited must not undo what was promoted since (ReleaseConflict).
    """
    ledger = Ledger(store)
    state = ledger.state()
    if champion and (state.champion is None or state.champion.snapshot_id != champion):
        raise ReleaseConflict(f"{champion} is no longer live.", fix="Look at `ragline releases`; roll back again if it is still wanted.")
    earlier = {release.snapshot_id: release for release in state.line[:-1] if release.snapshot_id not in state.collected}
    if not state.previous:
        raise NoPrevious("there is no earlier release to roll back to.", fix="Look at `ragline releases`.")
    target = to or state.previous.snapshot_id
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


def hold(store: Store, *, actor: str, reason: str, evidence: Mapping[str, Any] | None = None) -> Entry:
    """Make every promotion refuse until lifted. `evidence` holds what was found, such as drift findings with their numbers."""
    return _mark(store, Action.HOLD, after=Ledger(store).last_number(), actor=actor, reason=reason, evidence=evidence)


def lift(store: Store, *, actor: str, reason: str) -> Entry:
    """End all holds; the entry names them."""
    state = Ledger(store).state()
    if not state.holds:
        raise ReleaseError("there is no hold to lift.", fix="Look at `ragline status`.")
    lifted = {"lifted": [hold.number for hold in state.holds]}
    return _mark(store, Action.LIFT, after=state.number, actor=actor, reason=reason, evidence=lifted)


def pin(store: Store, snapshot_id: str, *, actor: str, reason: str) -> Entry:
    """Never collect this snapshot until it is unpinned; ReleaseError for one that was given up already."""
    after = Ledger(store).last_number()
    manifest = verify(store, snapshot_id)
    return _mark(store, Action.PIN, after=after, actor=actor, reason=reason, snapshot_id=snapshot_id, manifest_sha256=manifest.sha256)


def unpin(store: Store, snapshot_id: str, *, actor: str, reason: str) -> Entry:
    """Let a pinned snapshot be collected when nothing else keeps it."""
    state = Ledger(store).state()
    if snapshot_id not in state.pinned:
        raise SnapshotError(f"{snapshot_id} is not pinned.", fix="Look at `ragline status`.")
    return _mark(store, Action.UNPIN, after=state.number, actor=actor, reason=reason, snapshot_id=snapshot_id)


def _mark(store: Store, action: Action, *, after: int, actor: str, reason: str, **named: Any) -> Entry:
    _require_reason(action, reason)
    return Ledger(store).append(action, after=after, actor=actor, reason=reason, **named)


def _require_reason(action: Action, reason: str) -> None:
    if not reason.strip():
        raise ReleaseError(f"a {action} needs a reason.", fix="Give --reason.")
