"""A gate's outcome as evidence: bound to a snapshot's manifest and to an eval set, dated, and sealed against edits."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Literal

from rag_serving.errors import PromotionRefused
from rag_serving.store import Store

RETRIEVAL_QUALITY = "retrieval_quality"


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


def _seal(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _key(snapshot_id: str, gate: str) -> str:
    return f"verdicts/{snapshot_id}/{gate}.json"


def write_verdict(store: Store, verdict: Verdict) -> None:
    fields = asdict(verdict)
    store.write(_key(verdict.snapshot_id, verdict.gate), json.dumps({**fields, "seal": _seal(fields)}, indent=2, sort_keys=True).encode())


def read_verdict(store: Store, snapshot_id: str, gate: str) -> Verdict | None:
    """The stored verdict, or None when the gate never ran; PromotionRefused when it was edited after it was given."""
    key = _key(snapshot_id, gate)
    if not store.exists(key):
        return None
    try:
        fields = json.loads(store.read(key))
        seal = fields.pop("seal")
        verdict = Verdict(**{**fields, "rules": tuple(fields["rules"])})
    except (ValueError, KeyError, TypeError, AttributeError):
        raise PromotionRefused(f"the {gate} verdict of {snapshot_id} cannot be read.", fix="Evaluate the snapshot again.") from None
    if seal != _seal(fields):
        raise PromotionRefused(f"the {gate} verdict of {snapshot_id} was edited.", fix="Evaluate the snapshot again.")
    return verdict
