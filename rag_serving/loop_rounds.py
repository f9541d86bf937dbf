"""The computing of requests, shared out over the rounds of the event loop: one piece a round, so that short steps of others come in between.

A loop runs all that is ready before it looks at its sockets again. Under load many requests come back from their searches at once, each with
milliseconds of computing to do; one after another in the same round they would hold up every refusal, health check and new arrival.
"""

import asyncio
from collections import deque


class Rounds:
    """Of one event loop. Who has the turn computes until it next waits for something."""

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._taken = False

    async def turn(self) -> None:
        """Wait for a round in which nobody else computes; at once when this is one. First come, first served."""
        loop = asyncio.get_running_loop()
        if self._taken:
            turn: asyncio.Future[None] = loop.create_future()
            self._waiting.append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._next()
                raise
        self._taken = True
        loop.call_soon(self._next)

    def _next(self) -> None:
        """Hand the turn on; it stays taken for whoever was woken."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self._taken = False
