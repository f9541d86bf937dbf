"""The ledger as people read it: what is live, what is held and by whom, as figures and lists; and an alert for each new entry."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from rag_assets.alerts import Alert, Severity, send
from rag_assets.status import released_evaluation
from rag_serving.errors import StoreError
from rag_serving.releases import Action, Entry, Ledger, Release, fold
from rag_serving.settings import Settings
from rag_serving.snapshots import read_manifest
from rag_serving.store import Store

SHOWN_ENTRIES = 30
LATEST_NEWS = timedelta(hours=1)  # an alert that could not be delivered is tried for so long
_AT_ONCE = 5
_SEVERITY = {Action.HOLD: Severity.CRITICAL, Action.ROLLBACK: Severity.CRITICAL, Action.ABORT: Severity.WARNING}


def release_facts(store: Store) -> dict[str, Any]:
    """Figures of what is live, and two Markdown lists: `holds` and `history`, newest first. Reads the store alone."""
    entries = Ledger(store).entries()
    state = fold(entries)
    facts: dict[str, Any] = {
        "release": state.champion.number if state.champion else 0,
        "champion": state.champion.snapshot_id if state.champion else "none",
        "previous": state.previous.snapshot_id if state.previous else "none",
        "held": len(state.holds),
        "held_by": "; ".join(f"{hold.actor} (entry {hold.number}): {hold.reason}" for hold in state.holds) or "nobody",
        "holds": _holds_list(state.holds) if state.holds else "Nothing is held: promotions are open.",
        "history": _history_list(entries[: -SHOWN_ENTRIES - 1 : -1]) if entries else "Nothing was released yet.",
    }
    return facts | (_live_facts(store, state.champion) if state.champion else {})


def _live_facts(store: Store, live: Release) -> dict[str, Any]:
    """The live snapshot's model, sizes and MRR; what cannot be read is left out, since the ledger is to be seen all the same."""
    try:
        manifest, evaluation = read_manifest(store, live.snapshot_id), released_evaluation(store, live)
    except StoreError as error:
        return {"damage": error.what}
    facts: dict[str, Any] = {"embedding_model": manifest.embedding_model, "documents": manifest.documents, "chunks": manifest.rows}
    return facts | ({f"mrr_at_{evaluation.k}": evaluation.mrr} if evaluation else {})


def _holds_list(holds: Sequence[Entry]) -> str:
    return "\n".join(
        f"- **held by {_flat(hold.actor)}** since {hold.at} (entry {hold.number}): {_flat(hold.reason)}" for hold in reversed(holds)
    )


def _history_list(entries: Sequence[Entry]) -> str:
    return "\n".join(
        f"- **{entry.number} {entry.action}**{f' {entry.snapshot_id}' if entry.snapshot_id else ''} by {_flat(entry.actor)} at {entry.at}: "
        f"{_flat(entry.reason)}"
        for entry in entries
    )


def _flat(text: str) -> str:
    """Text on one line that means itself in Markdown."""
    flat = " ".join(text.split())
    for character in ("\\", "<", "[", "*", "_", "`"):
        flat = flat.replace(character, "\\" + character)
    return flat


def entry_alert(entry: Entry) -> Alert:
    """What a webhook hears of a ledger entry."""
    what = f"{entry.action} {entry.snapshot_id}" if entry.snapshot_id else str(entry.action)
    finding = entry.evidence.get("finding") or {}
    facts = {"entry": entry.number, "actor": entry.actor, "snapshot_id": entry.snapshot_id or finding.get("snapshot_id")}
    text = f"Entry {entry.number}: {what} by {entry.actor}. {entry.reason}"
    return Alert(str(entry.action), _SEVERITY.get(entry.action, Severity.INFO), text, {**facts, **finding.get("numbers", {})}, at=entry.at)


def tell(settings: Settings, entries: Sequence[Entry], *, told: int, now: datetime | None = None) -> int:
    """Send an alert for each fresh entry after number `told`, at most five a call; the number up to which nothing is left to tell.

    It stops at the first that the webhook does not take, so that the next call tries it again. Entries older than an hour are news no more.
    """
    now = now or datetime.now(UTC)
    sent = 0
    for entry in entries[told:]:
        if now - datetime.fromisoformat(entry.at) <= LATEST_NEWS:
            if sent == _AT_ONCE or not send(settings, entry_alert(entry)):
                return told
            sent += 1
        told = entry.number
    return told
