"""The last promotion that was refused, kept in the store: nobody may be looking when the promotion of a job is."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from rag_serving.errors import PromotionRefused, StoreError
from rag_serving.store import Store

_KEY = "promotion_refused.json"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Refusal:
    """`at` is an ISO time in UTC, `code` that of the error."""

    at: str
    snapshot_id: str
    actor: str
    code: str


@contextmanager
def remembering(store: Store, snapshot_id: str, *, actor: str) -> Iterator[None]:
    """Within, a promotion that is refused is written down; the error goes on as it was, whether or not that could be done."""
    try:
        yield
    except PromotionRefused as error:
        refusal = Refusal(datetime.now(UTC).isoformat(timespec="seconds"), snapshot_id, actor, error.code)
        try:
            store.write(_KEY, json.dumps(asdict(refusal)).encode())
        except StoreError as lost:
            log.warning("the refusal of %s was not written down: %s", snapshot_id, lost)
        raise


def last_refusal(store: Store) -> Refusal | None:
    """The newest; None when there was none, or it cannot be read."""
    try:
        return Refusal(**json.loads(store.read(_KEY))) if store.exists(_KEY) else None
    except (StoreError, ValueError, TypeError) as error:
        log.warning("the last refusal of a promotion cannot be read: %s", error)
        return None
