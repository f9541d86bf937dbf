"""What the drift detectors found, kept in the store: the records that sensors, alerts and the ledger read.

Each detector keeps one sealed record a day under `drift/<detector>/<date>.json`; a second run on the same day replaces it. The detectors and
the kinds of finding that they report:

- `evaluation`  the champion measured afresh: `mrr_fall`, or `fingerprint` when another model stands behind the champion's name
- `embedding`   stored vectors against the same texts embedded again: `fingerprint`, `runtime`
- `query`       asked queries against those at the release: `query`
- `corpus`      the newest snapshot's passages against the champion's: `corpus`
- `index`       age, unindexed rows, recall, diversity: `stale`, `recall`, `diversity`

A hold is placed from `latest_findings`: those of severity "hold" about the champion. A finding is told from others by its `kind`,
`snapshot_id` and `at`: it stays until its detector runs again, so one that was held and lifted must not be held again under the same `at`.
There is no heartbeat file to forget: `last_weekly_success` is the time up to which every detector has reported.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Literal, get_args

from rag_serving.errors import StoreError
from rag_serving.releases import Ledger
from rag_serving.seals import SealBroken, sealed, unsealed
from rag_serving.store import Store

Kind = Literal["mrr_fall", "fingerprint", "runtime", "query", "corpus", "stale", "recall", "diversity"]
Severity = Literal["hold", "warn"]
Detector = Literal["evaluation", "embedding", "query", "corpus", "index"]
DETECTORS: tuple[Detector, ...] = get_args(Detector)
_PREFIX = "drift"


@dataclass(frozen=True, slots=True)
class DriftFinding:
    """One thing that is not as it was when `snapshot_id` was released. `detail` is a sentence with its numbers, `at` an ISO time in UTC.

    A `mrr_fall` carries `mrr`, `floor` and `below_floor` (1.0 when the champion itself fell below the floor, so a rollback is due) and, where
    both were measured on the same queries, `mrr_at_release`, `difference`, `low`, `high` and `p_worse`.
    """

    kind: Kind
    severity: Severity
    snapshot_id: str
    detail: str
    numbers: Mapping[str, float]
    at: str


@dataclass(frozen=True, slots=True)
class DriftReport:
    """What one detector measured at one time. `snapshot_id` is the champion's, None when nothing was released; `numbers` are plotted."""

    detector: Detector
    snapshot_id: str | None
    at: str
    summary: str
    numbers: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)
    findings: tuple[DriftFinding, ...] = ()


def keep_report(store: Store, report: DriftReport) -> DriftReport:
    """Write a report under its detector and its day, replacing one of the same day; the report as it will be read."""
    store.write(_key(report.detector, f"{report.at[:10]}.json"), sealed(asdict(report)))
    return report


def read_reports(store: Store, detector: Detector) -> list[DriftReport]:
    """Every kept report of a detector, oldest first; StoreError names one that was damaged or edited."""
    return [_read(store, _key(detector, name)) for name in store.names(f"{_PREFIX}/{detector}")]


def latest_report(store: Store, detector: Detector) -> DriftReport | None:
    """The newest report of a detector, None before its first."""
    names = store.names(f"{_PREFIX}/{detector}")
    return _read(store, _key(detector, names[-1])) if names else None


def latest_findings(store: Store) -> list[DriftFinding]:
    """The findings of each detector's newest report that are about the champion, those that hold first.

    Findings about a snapshot that is live no longer are left out; none without a champion. Raises StoreError, ReleaseError.
    """
    champion = Ledger(store).state().champion
    if champion is None:
        return []
    reports = (latest_report(store, detector) for detector in DETECTORS)
    found = [finding for report in reports if report for finding in report.findings if finding.snapshot_id == champion.snapshot_id]
    return sorted(found, key=lambda finding: finding.severity)


def last_weekly_success(store: Store) -> datetime | None:
    """The time (UTC) up to which every detector has reported on a release: a run that stopped half-way does not move it.

    None before the first such run; that nothing was released yet is no report on a release.
    """
    reports = [latest_report(store, detector) for detector in DETECTORS]
    times = [datetime.fromisoformat(report.at) for report in reports if report and report.snapshot_id]
    return min(times) if len(times) == len(DETECTORS) else None


def _key(detector: Detector, name: str) -> str:
    return f"{_PREFIX}/{detector}/{name}"


def _read(store: Store, key: str) -> DriftReport:
    again = "Delete that file and run the weekly_drift job."
    try:
        fields = unsealed(store.read(key))
        return DriftReport(**{**fields, "findings": tuple(DriftFinding(**finding) for finding in fields["findings"])})
    except SealBroken:
        raise StoreError(f"{key} was edited.", fix=again) from None
    except (ValueError, KeyError, TypeError):
        raise StoreError(f"{key} cannot be read.", fix=again) from None
