"""How many requests are worked on at once, which of those waiting is next, and which are turned away at once because waiting is in vain."""

import asyncio
import math
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Literal

from rag_serving.deadline import Deadline
from rag_serving.errors import LimitExceeded

SHARE_TO_WAIT = 0.5  # of the time a request has left
SHARE_TO_EXPECT = 0.25  # more than that of expected waiting is refused on arrival, so that few wait in vain
FEWEST = 4
LATE_SECONDS = 0.05
_WEIGHT = 0.1  # of the newest duration in the moving average

Reason = Literal["queue", "deadline"]


class Slots:
    """At most `most` slots; at most `most_waiting` requests wait for one, each for at most half of the time it has left.

    Fair between callers: the next slot goes to the waiting caller that holds fewest, and among equals to the one served longest ago. A full
    queue makes room for a caller with fewer waiting by turning away the newest of the caller with most. A request that by present speed would
    wait too long is refused on arrival, so refusals are quick and the work that is done is in time. All on one event loop.

    `limit` is how many slots there are now. It follows what the machine can do: `pace` lowers it when the event loop runs late, which more
    work at once would only make worse, and raises it again while all slots are taken and the loop is prompt. Waiting for others, as for
    a language model, makes no loop late.
    """

    def __init__(self, most: int, most_waiting: int) -> None:
        self.limit = self.most = most
        self.most_waiting = most_waiting
        self.refused: Counter[Reason] = Counter()
        self._held: Counter[str] = Counter()
        self._queues: dict[str, list[asyncio.Future[None]]] = {}  # callers in the order in which they were last served
        self._seconds = 0.0  # moving average of how long a slot is held
        self._full = False

    @property
    def running(self) -> int:
        return self._held.total()

    @property
    def waiting(self) -> int:
        return sum(map(len, tuple(self._queues.values())))  # in one step: it is read from another thread too

    @asynccontextmanager
    async def held(self, who: str, deadline: Deadline) -> AsyncIterator[None]:
        """A slot until the `async with` ends; LimitExceeded `overloaded` when there is none in time."""
        await self._taken(who, deadline)
        started = time.monotonic()
        try:
            yield
        finally:
            seconds = time.monotonic() - started
            self._seconds += (seconds - self._seconds) * (_WEIGHT if self._seconds else 1.0)
            self._give_back(who)

    def pace(self, late_seconds: float) -> None:
        """Adapt `limit`, now and then, to how late the event loop runs: a fifth less, or one more."""
        if late_seconds > LATE_SECONDS:
            self.limit = max(min(FEWEST, self.most), self.limit * 4 // 5)
        elif self._full and self.limit < self.most:
            self.limit += 1
            self._hand_out()
        self._full = bool(self._queues) or self.running >= self.limit

    def expected_wait(self, who: str) -> float:
        """Seconds until one more request of this caller would get a slot, by the present order and speed."""
        turns = len(self._queues.get(who, ())) + 1
        ahead = sum(min(len(queue), turns) for caller, queue in self._queues.items() if caller != who)
        return (ahead + turns) * self._seconds / self.limit

    async def _taken(self, who: str, deadline: Deadline) -> None:
        if self.running < self.limit and not self._queues:
            self._held[who] += 1
            return
        patience = deadline.remaining * SHARE_TO_WAIT
        if self.expected_wait(who) > deadline.remaining * SHARE_TO_EXPECT:
            raise self._overloaded(who, "deadline")
        if self.waiting >= self.most_waiting:
            self._make_room(who)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queues.setdefault(who, []).append(turn)
        timer = asyncio.get_running_loop().call_later(patience, self._turn_away, who, turn, "deadline")
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self._give_back(who)
            else:
                self._leave(who, turn)
            raise
        finally:
            timer.cancel()

    def _make_room(self, who: str) -> None:
        greediest, queue = max(self._queues.items(), key=lambda each: len(each[1]), default=(who, []))
        if len(queue) <= len(self._queues.get(who, ())) + 1:
            raise self._overloaded(who, "queue")
        self._turn_away(greediest, queue[-1], "queue")

    def _turn_away(self, who: str, turn: asyncio.Future[None], reason: Reason) -> None:
        if not turn.done():
            turn.set_exception(self._overloaded(who, reason))
            self._leave(who, turn)

    def _leave(self, who: str, turn: asyncio.Future[None]) -> None:
        queue = self._queues.get(who, [])
        if turn in queue:
            queue.remove(turn)
        if not queue:
            self._queues.pop(who, None)

    def _give_back(self, who: str) -> None:
        self._held[who] -= 1
        if not self._held[who]:
            del self._held[who]
        self._hand_out()

    def _hand_out(self) -> None:
        while self._queues and self.running < self.limit:
            following = min(self._queues, key=lambda caller: self._held[caller])
            queue = self._queues.pop(following)
            turn = queue.pop(0)
            if queue:
                self._queues[following] = queue
            if not turn.done():
                self._held[following] += 1
                turn.set_result(None)

    def _overloaded(self, who: str, reason: Reason) -> LimitExceeded:
        self.refused[reason] += 1
        return LimitExceeded(
            "there are more requests than can be answered in time.",
            fix="Try again after the seconds that Retry-After says.",
            retry_after=max(1, math.ceil(self.expected_wait(who))),
        )
