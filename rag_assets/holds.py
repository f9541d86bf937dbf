"""Holds that ragline places itself: for what the drift detectors found, and for a weekly run that did not come.

The ledger is the only memory: a hold carries the finding behind it as evidence, so no finding is held twice, whoever asks and however often.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from rag_assets.drift import DriftFinding, last_weekly_success, latest_findings
from rag_assets.status import released_evaluation
from rag_serving.errors import StoreError
from rag_serving.releases import Action, Entry, Ledger, fold
from rag_serving.store import Store

LONGEST_SILENCE = timedelta(days=8)
MISSED_WEEK = "missed_week"


@dataclass(frozen=True, slots=True)
class DueRollback:
    """The champion fell below the floor and is held: `target` is the snapshot to go back to, `key` is the same for the same finding."""

    key: str
    champion: str
    target: str
    reason: str


def hold_findings(store: Store, *, actor: str) -> list[Entry]:
    """A hold for each finding of severity hold about the champion that has none yet; what was placed.

    A finding is passed over when it was held before, while a hold for the same kind and snapshot stands, and when such a hold was lifted
    after the finding was made; of two alike the one with more numbers is held. Raises ReleaseConflict when somebody else appends at the
    same moment; asking again then places the rest.
    """
    placed = []
    for finding in sorted(latest_findings(store), key=lambda finding: -len(finding.numbers)):
        if finding.severity == "hold":
            reason = f"{finding.detail}{_distance(finding)}{_proposal(store, finding)}"
            entry = _hold_once(store, asdict(finding), reason=reason, actor=actor)
            placed += [entry] if entry else []
    return placed


def hold_missed_week(store: Store, *, actor: str, now: datetime | None = None) -> Entry | None:
    """A hold when something is released and the last complete weekly run, or else the first release, is more than 8 days ago.

    None when all is well or the hold stands already. After a lift the next one comes a week later, if the silence goes on.
    """
    now = now or datetime.now(UTC)
    entries = Ledger(store).entries()
    if fold(entries).champion is None:
        return None
    last = last_weekly_success(store)
    since = last or datetime.fromisoformat(next(entry.at for entry in entries if entry.action is Action.PROMOTE))
    silence = now - since
    if silence <= LONGEST_SILENCE:
        return None
    weeks = (silence - LONGEST_SILENCE) // timedelta(weeks=1)
    found_at = since + LONGEST_SILENCE + weeks * timedelta(weeks=1)
    days = silence / timedelta(days=1)
    told = f"since {since.isoformat(timespec='minutes')}" if last else f"since the first release at {since.isoformat(timespec='minutes')}"
    numbers = {"days": round(days, 2), "allowed": LONGEST_SILENCE / timedelta(days=1)}
    finding = {"kind": MISSED_WEEK, "snapshot_id": None, "at": found_at.isoformat(), "numbers": numbers}
    reason = f"no complete weekly drift run {told}, {days:.1f} days; {LONGEST_SILENCE.days} are allowed. Run the weekly_drift job."
    return _hold_once(store, finding, reason=reason, actor=actor)


def due_rollback(store: Store) -> DueRollback | None:
    """The rollback that a standing hold asks for: its finding says that the champion is below the floor.

    None when the hold is older than the release (somebody made it live again since), when there is nothing to go back to, or when the
    earlier snapshot was itself last measured below the floor.
    """
    state = Ledger(store).state()
    champion = state.champion
    for hold in reversed(state.holds):
        finding = hold.evidence.get("finding") or {}
        if champion is None or hold.number < champion.number or not _below_floor(finding) or finding["snapshot_id"] != champion.snapshot_id:
            continue
        target = _target(store, floor=finding["numbers"].get("floor", 0.0))
        if target:
            return DueRollback(f"rollback {finding['snapshot_id']} {finding['at']}", champion.snapshot_id, target, finding["detail"])
    return None


def _below_floor(finding: Mapping[str, Any]) -> bool:
    return finding.get("kind") == "mrr_fall" and bool(finding["numbers"].get("below_floor"))


def _target(store: Store, *, floor: float) -> str | None:
    """The previous release, unless its own last evaluation is below the floor."""
    previous = Ledger(store).state().previous
    if previous is None:
        return None
    evaluation = None
    with suppress(StoreError):  # a damaged measurement of the one must not keep a hold from the other
        evaluation = released_evaluation(store, previous)
    return None if evaluation and evaluation.mrr < floor else previous.snapshot_id


def _distance(finding: DriftFinding) -> str:
    """How far another model is from the one that was released, where that was measured."""
    mean, probes = (finding.numbers.get(name) for name in ("cosine_mean", "probes"))
    known = finding.kind == "fingerprint" and mean is not None and probes is not None
    return f" {probes:.0f} texts embedded again have mean cosine {mean:.3f} with the stored vectors; 1 is the same model." if known else ""


def _proposal(store: Store, finding: DriftFinding) -> str:
    if not _below_floor(asdict(finding)):
        return ""
    target = _target(store, floor=finding.numbers.get("floor", 0.0))
    return f" Proposed: `ragline rollback` to {target}." if target else " There is no earlier release above the floor to roll back to."


def _hold_once(store: Store, finding: Mapping[str, Any], *, reason: str, actor: str) -> Entry | None:
    entries = Ledger(store).entries()
    if _answered(entries, finding):
        return None
    return Ledger(store).append(Action.HOLD, after=len(entries), actor=actor, reason=reason, evidence={"finding": finding})


def _answered(entries: Sequence[Entry], finding: Mapping[str, Any]) -> bool:
    """Whether the ledger has dealt with a finding: a hold for it, a standing one for its like, or one for its like lifted since."""
    alike = [hold for hold in entries if hold.action is Action.HOLD and _subject(hold.evidence.get("finding")) == _subject(finding)]
    if any(hold.evidence["finding"]["at"] == finding["at"] for hold in alike):
        return True
    standing = {hold.number for hold in fold(entries).holds}
    return any(hold.number in standing or _lifted_at(entries, hold) >= datetime.fromisoformat(finding["at"]) for hold in alike)


def _subject(finding: Mapping[str, Any] | None) -> tuple[str, str | None] | None:
    return (finding["kind"], finding["snapshot_id"]) if finding else None


def _lifted_at(entries: Sequence[Entry], hold: Entry) -> datetime:
    """When a hold that stands no longer was lifted."""
    lift = next(
        entry
        for at, entry in enumerate(entries)
        if entry.action is Action.LIFT and entry.number > hold.number and hold not in fold(entries[: at + 1]).holds
    )
    return datetime.fromisoformat(lift.at)
