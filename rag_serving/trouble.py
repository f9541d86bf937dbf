"""What is wrong with a thing that is tried again: told once, in words fit for clients, with growing pauses between the attempts."""

import logging
import time
from dataclasses import dataclass
from datetime import UTC, datetime

from rag_serving.errors import RaglineError, SnapshotError, StoreError

LONGEST_PAUSE = 30.0  # seconds between attempts

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Problem:
    """Why something the ledger names is not open; `detail` is fit for clients."""

    code: str
    detail: str
    fix: str
    at: str


class Trouble:
    """The problem that stands with one thing, and when to try again: after a pause that doubles while the problem stays."""

    def __init__(self, what: str, *, shortest: float) -> None:
        self.problem: Problem | None = None
        self._what = what
        self._shortest = shortest
        self._pause = 0.0
        self._retry_at = 0.0

    @property
    def due(self) -> bool:
        """Whether there is a problem and its pause is over."""
        return self.problem is not None and time.monotonic() >= self._retry_at

    def clear(self) -> None:
        self.problem, self._pause = None, 0.0

    def note(self, error: Exception, *, meanwhile: str) -> None:
        """Keep the problem; log it when it is a new one."""
        self._pause = min(max(self._pause * 2, self._shortest), LONGEST_PAUSE)
        self._retry_at = time.monotonic() + self._pause
        detail, fix = _public(error)
        if self.problem is None or self.problem.detail != detail:
            self.problem = Problem(getattr(error, "code", "internal"), detail, fix, datetime.now(UTC).isoformat(timespec="milliseconds"))
            log.error("%s, %s: %s", self._what, meanwhile, error, exc_info=not isinstance(error, RaglineError))


def _public(error: Exception) -> tuple[str, str]:
    """What a client may read of an error: errors of the store name its place, others are unforeseen."""
    if isinstance(error, RaglineError) and (isinstance(error, SnapshotError) or not isinstance(error, StoreError)):
        return error.what, error.fix
    return f"the store cannot be read ({type(error).__name__}).", "The service's log has the details; run `ragline doctor`."
