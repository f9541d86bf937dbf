"""A gate's outcome as evidence: bound to a snapshot's manifest and to an eval set, dated, and sealed against edits."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Literal

from rag_serving.errors import PromotionRefused
from rag_serving.seals import SealBroken, sealed, unsealed
from rag_serving.store import Store

RETRIEVAL_QUALITY = "retrieval_quality"
WARM_UP = "warm_up"
CANARY = "canary"
GATES = (RETRIEVAL_QUALITY, WARM_UP, CANARY)  # in the order they are passed
COMPARING = frozenset({RETRIEVAL_QUALITY, CANARY})  # gates that compare with the champion


@dataclass(frozen=True, slots=True)
class Verdict:
    """`rules` are the gate's rules with their numbers; `champion` is the snapshot compared with, None when nothing was live."""

    gate: str
    snapshot_id: str
    manifest_sha256: str
    eval_set_sha256: str
    champion: str | None
    outcome: Literal["PASS", "FAIL", "INCONCLUSIVE"]
    summary: str
    rules: tuple[Mapping[str, Any], ...]
    measured_at: str

    def age_days(self, now: datetime) -> float:
        return (now - datetime.fromisoformat(self.measured_at)).total_seconds() / 86400


def _key(snapshot_id: str, gate: str) -> str:
    return f"verdicts/{snapshot_id}/{gate}.json"


def write_verdict(store: Store, verdict: Verdict) -> None:
    store.write(_key(verdict.snapshot_id, verdict.gate), sealed(asdict(verdict)))


def read_verdict(store: Store, snapshot_id: str, gate: str) -> Verdict | None:
    """The stored verdict, or None when the gate never ran; PromotionRefused (verdict_edited) when it is not as it was given."""
    key = _key(snapshot_id, gate)
    if not store.exists(key):
        return None
    again = "Run the gate again: `ragline run`."
    try:
        fields = unsealed(store.read(key))
        return Verdict(**{**fields, "rules": tuple(fields["rules"])})
    except SealBroken:
        raise PromotionRefused(f"the {gate} verdict of {snapshot_id} was edited.", fix=again, code="verdict_edited") from None
    except (ValueError, KeyError, TypeError):
        raise PromotionRefused(f"the {gate} verdict of {snapshot_id} cannot be read.", fix=again, code="verdict_edited") from None


def trusted_verdict(store: Store, snapshot_id: str, gate: str) -> Verdict | None:
    """The stored verdict as it was given; None when there is none or it was altered since, as the gate then has to run again."""
    try:
        return read_verdict(store, snapshot_id, gate)
    except PromotionRefused:
        return None


def passed(store: Store, snapshot_id: str, manifest_sha256: str, *, champion: str | None) -> bool:
    """Whether a PASS of every gate is on file for exactly this manifest against `champion`, of whatever age."""
    found = [trusted_verdict(store, snapshot_id, gate) for gate in GATES]
    return all(
        verdict
        and (verdict.outcome, verdict.manifest_sha256) == ("PASS", manifest_sha256)
        and (verdict.gate not in COMPARING or verdict.champion == champion)
        for verdict in found
    )


def require_pass(
    store: Store, gate: str, *, snapshot_id: str, manifest_sha256: str, champion: str | None, max_age_days: float, now: datetime
) -> Verdict:
    """The PASS of `gate` for exactly this manifest against the present `champion`, not older than `max_age_days`.

    Raises PromotionRefused with a code of its own for each way in which there is none: verdict_absent, _edited, _foreign, _failed, _stale
    and _outdated.
    """
    verdict = read_verdict(store, snapshot_id, gate)
    again = "Run the gates again: `ragline run`."
    named = gate.replace("_", " ")
    if verdict is None:
        raise PromotionRefused(f"{snapshot_id} has no {named} verdict.", fix=again, code="verdict_absent")
    if (verdict.gate, verdict.snapshot_id, verdict.manifest_sha256) != (gate, snapshot_id, manifest_sha256):
        raise PromotionRefused(
            f"the {named} verdict of {snapshot_id} belongs to another snapshot or gate.", fix=again, code="verdict_foreign"
        )
    if verdict.outcome != "PASS":
        raise PromotionRefused(verdict.summary, fix="Improve it, or override with --override --reason.", code="verdict_failed")
    age = verdict.age_days(now)
    if not 0 <= age <= max_age_days:
        what = f"the {named} verdict of {snapshot_id} is {age:.1f} days old; {max_age_days:g} are allowed."
        raise PromotionRefused(what, fix=again, code="verdict_stale")
    if gate in COMPARING and verdict.champion != champion:
        what = f"the {named} verdict compared {snapshot_id} with {verdict.champion}, but {champion} is live now."
        raise PromotionRefused(what, fix=again, code="verdict_outdated")
    return verdict
