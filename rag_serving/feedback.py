"""What people say of answers, and what they asked: kept as a queue of queries that wait for a judgment.

A question enters the queue once, whoever asks it again; it holds the words of the question, because a person chose to send them, without
secrets and personal data.
`ragline label` turns the queue into judged queries of an eval set.
"""

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from rag_serving.admission import clean_text
from rag_serving.errors import AlreadyExists, StoreError
from rag_serving.signals.redaction import redacted
from rag_serving.store import Store

QUEUE = "reviews/queue"
SETTLED = "reviews/settled"
MOST_WAITING = 10_000

Origin = Literal["feedback", "log", "synthetic"]


class Feedback(BaseModel):
    """A verdict on an answer. The query is sent along by whoever judges it; nothing is looked up from a trace."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    query: str = Field(description="The question that was asked, 1 to 4000 characters.")
    verdict: Literal["up", "down"]
    snapshot_id: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{7,63}$", description="The snapshot that answered.")
    doc_ids: list[Annotated[str, Field(max_length=1000)]] = Field(
        default=[], max_length=50, description="Documents that were shown, best first."
    )
    comment: str = Field("", max_length=1000)
    trace_id: str | None = Field(None, pattern=r"^[0-9a-f]{32}$", description="The trace id of the reply that is judged.")


@dataclass(frozen=True, slots=True)
class Waiting:
    """A query that waits for a judgment. `doc_ids` are hints: what was shown, or what it was written from."""

    review_id: str
    query: str
    origin: Origin
    at: str
    verdict: str = ""
    snapshot_id: str = ""
    doc_ids: tuple[str, ...] = ()
    comment: str = ""


def review_id_of(query: str) -> str:
    """The identity of a question, from its words without case and spacing: 32 hex digits."""
    return hashlib.sha256(" ".join(query.split()).casefold().encode()).hexdigest()[:32]


def propose(
    store: Store,
    query: str,
    origin: Origin,
    *,
    verdict: str = "",
    snapshot_id: str = "",
    doc_ids: Sequence[str] = (),
    comment: str = "",
) -> bool:
    """Queue a query for judgment; False when it is queued or settled already, or the queue is full. Raises QueryError for what is no text."""
    text = redacted(clean_text(query))
    review_id = review_id_of(text)
    if store.exists(f"{SETTLED}/{review_id}.json") or len(store.names(QUEUE)) >= MOST_WAITING:
        return False
    at = datetime.now(UTC).isoformat(timespec="seconds")
    waiting = Waiting(review_id, text, origin, at, verdict, snapshot_id, tuple(doc_ids), redacted(comment))
    try:
        store.create(f"{QUEUE}/{review_id}.json", json.dumps(asdict(waiting), ensure_ascii=False).encode())
    except AlreadyExists:
        return False
    return True


def waiting_queries(store: Store) -> list[Waiting]:
    """The queue, oldest first: those a person marked down before the rest."""
    settled = set(store.names(SETTLED))
    found = [_read(store, name) for name in store.names(QUEUE) if name not in settled]
    return sorted(found, key=lambda each: (each.verdict != "down", each.at, each.review_id))


def settle(store: Store, waiting: Waiting, *, outcome: Literal["judged", "no_answer", "skipped"], actor: str) -> None:
    """End a wait, with who decided what; deciding again is kept as it was the first time."""
    record = {"review_id": waiting.review_id, "outcome": outcome, "actor": actor, "at": datetime.now(UTC).isoformat(timespec="seconds")}
    with suppress(AlreadyExists):
        store.create(f"{SETTLED}/{waiting.review_id}.json", json.dumps(record).encode())
    store.remove(f"{QUEUE}/{waiting.review_id}.json")


def _read(store: Store, name: str) -> Waiting:
    try:
        fields = json.loads(store.read(f"{QUEUE}/{name}"))
        return Waiting(**{**fields, "doc_ids": tuple(fields["doc_ids"])})
    except (ValueError, TypeError, KeyError):
        raise StoreError(f"{QUEUE}/{name} cannot be read.", fix="Delete that file; the question can be sent again.") from None
