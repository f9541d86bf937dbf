"""The last promotion that was refused, kept in the store: nobody may be looking when the promotion of a job is."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from rag_serving.errors import PromotionRefused, StoreError
from rag_serving.releases import Ledger
from rag_serving.store import Store

_KEY = "promotion_refused.json"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Refusal:
    """`code` is that of the error, `after` the number of the ledger's newest entry then."""

    at: datetime
    after: int
    snapshot_id: str
    actor: str
    code: str


@contextmanager
def remembering(store: Store, snapshot_id: str, *, actor: str) -> Iterator[None]:
    """Within, a promotion that is refused is written down; the error goes on as it was, whether or not that could be done."""
    try:
        yield
    except PromotionRefused as error:
        try:
            refusal = Refusal(datetime.now(UTC), Ledger(store).last_number(), snapshot_id, actor, error.code)
            store.write(_KEY, json.dumps(asdict(refusal) | {"at": refusal.at.isoformat(timespec="seconds")}).encode())
        except StoreError as lost:
            log.warning("the refusal of %s was not written down: %s", snapshot_id, lost)
        raise


def last_refusal(store: Store) -> Refusal | None:
    """The newest; None when there was none, or it cannot be read."""
    try:
        if not store.exists(_KEY):
            return None
        found = json.loads(store.read(_KEY))
        return Refusal(**found | {"at": datetime.fromisoformat(found["at"]), "after": int(found["after"])})
    except (StoreError, ValueError, TypeError, KeyError) as error:
        log.warning("the last refusal of a promotion cannot be read: %s", error)
        return None
