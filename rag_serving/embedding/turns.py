"""Work of other kinds than embedding, which the computing threads do in a turn of its own: token vectors and reranking."""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from rag_serving.deadline import Deadline
from rag_serving.errors import DeadlineExceeded

MOST_WAITING = 32  # of one line: who asks has a tight budget and something to fall back to

T = TypeVar("T")


class Overloaded(Exception):
    """More work waits than the service takes on."""


@dataclass(slots=True, eq=False)
class Turn:
    """One such piece of work: `run` is called on a thread, `done` hears of it in its event loop."""

    run: Callable[[], Any]
    deadline: Deadline
    loop: asyncio.AbstractEventLoop
    done: asyncio.Future[Any]
    arrived: float = field(default_factory=time.monotonic)

    @property
    def over(self) -> bool:
        """Whether nobody waits for it, or not for long enough."""
        return self.done.done() or self.deadline.expired

    def take(self) -> None:
        """Do it, and tell who waits. Work that nobody waits for any more, or not for long enough, is left undone."""
        if self.deadline.expired:
            self._tell(None, DeadlineExceeded("the time for this request ended before its turn.", fix="Allow more time."))
        elif not self.done.done():
            try:
                result = self.run()
            except Exception as error:  # noqa: BLE001 - who waits gets it; the thread must go on
                self._tell(None, error)
            else:
                self._tell(result, None)

    def _tell(self, result: Any, error: Exception | None) -> None:
        def tell() -> None:
            if self.done.done():
                return
            if error is None:
                self.done.set_result(result)
            else:
                self.done.set_exception(error)

        self.loop.call_soon_threadsafe(tell)


class Turns:
    """Those that wait, first come, first served. Whoever uses it holds a lock."""

    def __init__(self) -> None:
        self._line: deque[Turn] = deque()

    def add(self, run: Callable[[], T], deadline: Deadline) -> "asyncio.Future[T]":
        """Overloaded when too many wait. Called in an event loop; cancel the future if nobody waits for it any more."""
        if len(self._line) >= MOST_WAITING:
            for turn in [turn for turn in self._line if turn.over]:
                self._line.remove(turn)
                turn.take()
        if len(self._line) >= MOST_WAITING:
            raise Overloaded
        loop = asyncio.get_running_loop()
        turn = Turn(run, deadline, loop, loop.create_future())
        self._line.append(turn)
        return turn.done

    def next(self, *, before: float | None = None) -> Turn | None:
        """The first that waits, taken out of the line; None when none does, or none that arrived `before` that moment."""
        if self._line and (before is None or self._line[0].arrived <= before):
            return self._line.popleft()
        return None

    def cancel(self) -> None:
        """Nobody will do what waits."""
        for turn in self._line:
            turn.done.cancel()
        self._line.clear()
