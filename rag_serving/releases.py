"""The release ledger: an append-only list of numbered, hash-chained entries, and the state it folds to.

Entry N+1 is created only if absent, so of two writers exactly one wins. The entry number, never a clock, orders releases.
"""

import getpass
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from rag_serving.errors import AlreadyExists, ReleaseConflict, ReleaseError
from rag_serving.seals import sealed
from rag_serving.store import Store

_PREFIX = "releases"
_GENESIS = "0" * 64


class Action(StrEnum):
    CANARY = "canary"
    PROMOTE = "promote"
    ABORT = "abort"
    ROLLBACK = "rollback"
    HOLD = "hold"
    LIFT = "lift"
    PIN = "pin"
    UNPIN = "unpin"
    COLLECT = "collect"


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the ledger. `evidence` holds the verdicts and numbers that justified it; `parent_sha256` chains it to the entry before.

    Its file ends in a seal over the fields, so that an edit of the newest entry shows as well.
    """

    number: int
    action: Action
    actor: str
    reason: str
    at: str
    snapshot_id: str | None = None
    manifest_sha256: str | None = None
    evidence: Mapping[str, Any] = field(default_factory=dict)
    parent_sha256: str = _GENESIS

    def encode(self) -> bytes:
        return sealed(asdict(self))

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Release:
    """A snapshot that is or was live, with the entry that made it so."""

    snapshot_id: str
    manifest_sha256: str
    number: int
    evidence: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class State:
    """What the ledger says now. `line` is the promoted snapshots still in force, oldest first: a rollback removes from its end.

    `withdrawn` are the snapshots that a rollback removed and nobody promoted again, `pinned` those that are never collected, `collected`
    those that were given up for good: their bytes may be gone, so no later entry may name them.
    """

    number: int = 0
    line: tuple[Release, ...] = ()
    canary: Release | None = None
    holds: tuple[Entry, ...] = ()
    withdrawn: frozenset[str] = frozenset()
    pinned: frozenset[str] = frozenset()
    collected: frozenset[str] = frozenset()

    @property
    def kept(self) -> frozenset[str]:
        """Snapshots that must never be collected: live, previous, canary and pinned."""
        standing = {release.snapshot_id for release in (self.champion, self.previous, self.canary) if release}
        return self.pinned | standing

    @property
    def champion(self) -> Release | None:
        return self.line[-1] if self.line else None

    @property
    def previous(self) -> Release | None:
        """Where a rollback leads: the newest earlier release of another snapshot that was not collected."""
        gone = self.collected | ({self.champion.snapshot_id} if self.champion else set())
        return next((release for release in reversed(self.line[:-1]) if release.snapshot_id not in gone), None)


def fold(entries: Sequence[Entry]) -> State:
    """The state after `entries`, which start at number 1."""
    state = State()
    for entry in entries:
        state = _apply(state, entry)
    return state


def _apply(state: State, entry: Entry) -> State:
    state = replace(state, number=entry.number)
    match entry.action:
        case Action.HOLD:
            return replace(state, holds=(*state.holds, entry))
        case Action.LIFT:
            return replace(state, holds=())
        case Action.ABORT:
            return replace(state, canary=None)
        case Action.COLLECT:
            return _collect(state, entry)
        case Action.UNPIN:
            return replace(state, pinned=state.pinned - {entry.snapshot_id})
        case _:
            return _name_snapshot(state, entry)


def _name_snapshot(state: State, entry: Entry) -> State:
    if entry.snapshot_id is None or entry.manifest_sha256 is None:
        raise ReleaseError(f"ledger entry {entry.number} ({entry.action}) names no snapshot.", fix="Restore the ledger from a backup.")
    release = Release(entry.snapshot_id, entry.manifest_sha256, entry.number, entry.evidence)
    if release.snapshot_id in state.collected:
        raise ReleaseError(f"ledger entry {entry.number} names {release.snapshot_id}, which was collected.", fix="Choose another snapshot.")
    if entry.action is Action.PIN:
        return replace(state, pinned=state.pinned | {release.snapshot_id})
    if entry.action is Action.CANARY:
        return replace(state, canary=release)
    if entry.action is Action.PROMOTE:
        return replace(state, line=(*state.line, release), canary=None, withdrawn=state.withdrawn - {release.snapshot_id})
    return _roll_back(state, release)


def _roll_back(state: State, release: Release) -> State:
    kept = [index for index, past in enumerate(state.line[:-1]) if past.snapshot_id == release.snapshot_id]
    if not kept:
        raise ReleaseError(
            f"ledger entry {release.number} rolls back to {release.snapshot_id}, which was not live before the champion.",
            fix="Restore the ledger from a backup.",
        )
    line = (*state.line[: kept[-1]], replace(state.line[kept[-1]], number=release.number))
    withdrawn = state.withdrawn | {past.snapshot_id for past in state.line[kept[-1] + 1 :]} - {past.snapshot_id for past in line}
    return replace(state, line=line, canary=None, withdrawn=withdrawn)


def _collect(state: State, entry: Entry) -> State:
    given_up = frozenset(entry.evidence.get("snapshots", ()))
    if standing := given_up & state.kept:
        raise ReleaseError(
            f"ledger entry {entry.number} collects {min(standing)}, which is live, previous, canary or pinned.",
            fix="Look at `ragline releases` and try again.",
        )
    return replace(state, collected=state.collected | given_up)


class Ledger:
    """Reads and appends entries under `releases/` of a store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def entries(self) -> list[Entry]:
        """All entries, oldest first, with numbers and hash chain verified; ReleaseError names the first that does not fit."""
        entries: list[Entry] = []
        parent = _GENESIS
        for expected, name in enumerate(self._store.names(_PREFIX), start=1):
            data = self._store.read(f"{_PREFIX}/{name}")
            try:
                fields = json.loads(data)
                del fields["seal"]
                entry = Entry(**{**fields, "action": Action(fields["action"])})
            except (ValueError, TypeError, KeyError) as error:
                raise ReleaseError(f"ledger entry {name} cannot be read: {error}.", fix="Restore it from a backup.") from None
            if entry.number != expected or name != _name(expected) or entry.parent_sha256 != parent or entry.encode() != data:
                raise ReleaseError(f"ledger entry {name} does not continue entry {expected - 1}.", fix="Restore the ledger from a backup.")
            entries.append(entry)
            parent = entry.sha256
        return entries

    def state(self) -> State:
        return fold(self.entries())

    def last_number(self) -> int:
        """Number of the newest entry, 0 for an empty ledger; reads names only, so it is cheap to poll."""
        names = self._store.names(_PREFIX)
        number = names[-1].removesuffix(".json") if names else "0"
        if not number.isdecimal():
            raise ReleaseError(f"{names[-1]} in the ledger is not an entry.", fix="Remove that file.")
        return int(number)

    def append(
        self,
        action: Action,
        *,
        after: int,
        actor: str,
        reason: str,
        snapshot_id: str | None = None,
        manifest_sha256: str | None = None,
        evidence: Mapping[str, Any] | None = None,
    ) -> Entry:
        """Append entry `after + 1`; ReleaseConflict when somebody else appended since number `after` was read."""
        entries = self.entries()
        if len(entries) != after:
            raise ReleaseConflict(f"the ledger is at entry {len(entries)}, not {after}.", fix="Look at `ragline releases` and try again.")
        entry = Entry(
            number=after + 1,
            action=action,
            actor=actor,
            reason=reason,
            at=datetime.now(UTC).isoformat(timespec="seconds"),
            snapshot_id=snapshot_id,
            manifest_sha256=manifest_sha256,
            evidence=json.loads(json.dumps(evidence or {})),  # as it will be read
            parent_sha256=entries[-1].sha256 if entries else _GENESIS,
        )
        fold([*entries, entry])
        try:
            self._store.create(f"{_PREFIX}/{_name(entry.number)}", entry.encode())
        except AlreadyExists:
            raise ReleaseConflict(
                f"entry {entry.number} was written by somebody else.", fix="Look at `ragline releases` and try again."
            ) from None
        return entry


def _name(number: int) -> str:
    return f"{number:06d}.json"


def current_actor(configured: str | None) -> str:
    """Who acts, for the ledger: RAGLINE_ACTOR, else the login name, else the numeric user id."""
    if configured:
        return configured
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid-{os.getuid()}"
