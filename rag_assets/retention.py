"""Retention: what the store holds that nothing needs any more, and how it goes.

Live, previous, canary, pinned and current snapshots stay, and the newest few of each embedding model. The rest is given up in the ledger first
(an entry that no other writer can overtake, after which no promotion accepts those snapshots), then taken away one by one. A collection that
was interrupted at any point is finished by the next one. Evidence of what was ever released stays.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from rag_assets.corpus import read_pointer, stale_parts
from rag_serving.errors import SnapshotError, StoreError
from rag_serving.releases import Action, Entry, Ledger, State
from rag_serving.settings import Retention
from rag_serving.snapshots import Manifest, read_manifest, snapshot_ids
from rag_serving.store import Store

Kind = Literal["snapshots", "verdicts", "evaluations", "embeddings", "corpus", "leftover"]
_LEFTOVER_DAYS = 1.0
_ID_DIGITS = 12  # of the manifest hash, at the end of a snapshot id


@dataclass(frozen=True, slots=True)
class Garbage:
    """Something to collect. `bytes` of a snapshot are its files' sizes; those it shares with another are freed with the last of them."""

    kind: Kind
    name: str
    bytes: int
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What a collection keeps (snapshot id to reason) and takes, decided at ledger entry `number`."""

    number: int
    kept: Mapping[str, str]
    garbage: tuple[Garbage, ...]

    def of(self, kind: Kind) -> tuple[Garbage, ...]:
        return tuple(each for each in self.garbage if each.kind == kind)


def plan(store: Store, retention: Retention) -> Plan:
    """Decide from the ledger and the manifests alone.

    ReleaseError when the ledger is damaged, StoreError when a pointer to what is in use is: then nothing may be collected.
    """
    ledger = Ledger(store)
    entries = ledger.entries()
    state = ledger.state()
    manifests: dict[str, Manifest | None] = {snapshot_id: _manifest(store, snapshot_id) for snapshot_id in snapshot_ids(store)}
    kept = _kept(store, state, manifests, retention)
    released = {entry.manifest_sha256[:_ID_DIGITS] for entry in entries if entry.manifest_sha256}
    garbage = (
        *_snapshots(manifests, kept),
        *_evidence(store, frozenset(snapshot_id[-_ID_DIGITS:] for snapshot_id in kept) | released),
        *_embeddings(store, manifests, kept, retention),
        *(Garbage("corpus", part, 0, "an earlier table's rows") for part in stale_parts(store, idle_days=retention.unused_days)),
        *(Garbage("leftover", name, size, "interrupted work") for name, size in store.leftovers(idle_days=_LEFTOVER_DAYS).items()),
    )
    return Plan(state.number, kept, garbage)


def collect(store: Store, decided: Plan, *, actor: str) -> Entry | None:
    """Take away what was decided; the ledger entry that gave snapshots up, None when none had to be.

    ReleaseConflict when the ledger went on since the plan was made and a snapshot is to be given up: then nothing is touched.
    """
    ledger = Ledger(store)
    new = sorted({garbage.name for garbage in decided.of("snapshots")} - ledger.state().collected)
    entry = None
    if new:
        reason = f"{len(new)} snapshot{'s' * (len(new) > 1)} beyond retention"
        entry = ledger.append(Action.COLLECT, after=decided.number, actor=actor, reason=reason, evidence={"snapshots": new})
    for garbage in decided.garbage:
        if garbage.kind == "leftover":
            store.discard(garbage.name)
        else:
            store.remove(f"{garbage.kind}/{garbage.name}")
    return entry


def _manifest(store: Store, snapshot_id: str) -> Manifest | None:
    try:
        return read_manifest(store, snapshot_id)
    except SnapshotError:
        return None


def _kept(store: Store, state: State, manifests: Mapping[str, Manifest | None], retention: Retention) -> dict[str, str]:
    """Snapshots that stay, with the first reason that applies."""
    standing = {"live": state.champion, "previous": state.previous, "canary": state.canary}
    reasons: dict[str, str] = {}
    for reason, release in standing.items():
        if release:
            reasons.setdefault(release.snapshot_id, reason)
    for snapshot_id in sorted(state.pinned):
        reasons.setdefault(snapshot_id, "pinned")
    for snapshot_id in _current(store):
        reasons.setdefault(snapshot_id, "current")
    readable = [manifest for snapshot_id, manifest in manifests.items() if manifest and snapshot_id not in state.collected]
    of_model: Counter[str] = Counter()
    for manifest in sorted(readable, key=lambda manifest: (manifest.built_at, manifest.snapshot_id), reverse=True):
        of_model[manifest.embedding_model] += 1
        if of_model[manifest.embedding_model] <= retention.keep:
            reasons.setdefault(manifest.snapshot_id, f"among the newest {retention.keep} of {manifest.embedding_model}")
    for snapshot_id, readable_manifest in manifests.items():
        if readable_manifest is None:
            reasons.setdefault(snapshot_id, "its manifest cannot be read: restore it, or remove it by hand")
    return {snapshot_id: reason for snapshot_id, reason in reasons.items() if snapshot_id in manifests.keys() - state.collected}


def _current(store: Store) -> list[str]:
    """The snapshot that each embedding model's next evaluation measures."""
    names = [name for name in store.names("corpus") if name.startswith("snapshot-") and name.endswith(".json")]
    return [_said(store, f"corpus/{name}", "snapshot_id") for name in names]


def _said(store: Store, key: str, what: str) -> str:
    """One value of a small JSON file that decides what stays; StoreError when it does not say: then nothing may be collected."""
    value = read_pointer(store, key).get(what)
    if not isinstance(value, str):
        raise StoreError(f"{key} names no {what}.", fix="Delete that file; the next run makes it again.")
    return value


def _snapshots(manifests: Mapping[str, Manifest | None], kept: Mapping[str, str]) -> Iterator[Garbage]:
    for snapshot_id, manifest in manifests.items():
        if manifest and snapshot_id not in kept:
            yield Garbage(
                "snapshots", snapshot_id, manifest.bytes, f"not among the newest of {manifest.embedding_model}, and nothing needs it"
            )


def _evidence(store: Store, needed: frozenset[str]) -> Iterator[Garbage]:
    """Evaluations and verdicts of snapshots that are gone and were never released; `needed` are the first digits of the other manifests."""
    for name in store.names("evaluations"):
        if name[:_ID_DIGITS] not in needed:
            yield Garbage("evaluations", name, 0, "its snapshot is gone and was never released")
    for name in store.names("verdicts"):
        if name[-_ID_DIGITS:] not in needed:
            yield Garbage("verdicts", name, 0, "its snapshot is gone and was never released")


def _embeddings(store: Store, manifests: Mapping[str, Manifest | None], kept: Mapping[str, str], retention: Retention) -> Iterator[Garbage]:
    """Vectors of fingerprints that no kept snapshot has and no configured model had when it last embedded, untouched for long."""
    names = store.names("embeddings")
    configured = {_said(store, f"embeddings/{name}", "fingerprint") for name in names if name.endswith(".model.json")}
    fingerprints = configured | {manifest.fingerprint for name in kept if (manifest := manifests[name])}
    used = {fingerprint[:32] for fingerprint in fingerprints}
    unreadable = any(manifest is None for manifest in manifests.values())
    for name in names:
        if "." not in name and name not in used and not unreadable and store.idle_days(f"embeddings/{name}") > retention.unused_days:
            yield Garbage("embeddings", name, 0, f"no snapshot uses them, unchanged for over {retention.unused_days:g} days")
