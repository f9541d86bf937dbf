"""What keeps a failing dependency from being asked again and again: a circuit breaker, and a budget for repeated requests."""

import time
from collections import deque
from collections.abc import Callable
from typing import Literal

State = Literal["closed", "open", "half_open"]


class Breaker:
    """Opens after `failures` within `window_seconds`; after `open_seconds` one caller tries, and its success closes it again.

    `enter()` comes before each call, and one of `succeeded`, `failed` or `abandoned` after it, with the pass that `enter` gave. What a call
    says counts only for the state it began in. Not thread-safe: it belongs to one event loop. `clock` gives monotonic seconds.
    """

    def __init__(
        self, *, failures: int = 5, window_seconds: float = 10.0, open_seconds: float = 5.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.opened = 0  # times it opened so far
        self._window = window_seconds
        self._open_seconds = open_seconds
        self._clock = clock
        self._failures: deque[float] = deque(maxlen=failures)
        self._open_until: float | None = None
        self._probing = False
        self._pass = 0

    @property
    def state(self) -> State:
        """closed: calls pass; open: none does; half_open: the next call, or the one under way, decides."""
        if self._open_until is None:
            return "closed"
        return "half_open" if self._probing or self._clock() >= self._open_until else "open"

    @property
    def retry_seconds(self) -> float:
        """Seconds until a call may be tried; 0 when one may now."""
        return 0.0 if self._open_until is None else max(0.0, self._open_until - self._clock())

    def enter(self) -> int | None:
        """A pass for one call; None: do not call."""
        if self._open_until is not None:
            if self._probing or self._clock() < self._open_until:
                return None
            self._probing = True
            self._pass += 1
        return self._pass

    def succeeded(self, given: int) -> None:
        """The call gave a usable result."""
        if given == self._pass and self._probing:
            self._failures.clear()
            self._open_until = None
            self._probing = False

    def failed(self, given: int) -> None:
        """The call failed by the dependency's fault."""
        if given != self._pass:
            return
        now = self._clock()
        self._failures.append(now)
        if self._probing or (len(self._failures) == self._failures.maxlen and now - self._failures[0] <= self._window):
            self._open_until = now + self._open_seconds
            self._probing = False
            self._pass += 1
            self._failures.clear()
            self.opened += 1

    def abandoned(self, given: int) -> None:
        """The call ended by its caller's doing, or says nothing about the dependency: the next one may try."""
        if given == self._pass:
            self._probing = False


class Budget:
    """Extra requests as a share of the ordinary ones: each of those earns `share`, each extra one costs 1, at most `most` are saved up.

    It starts with one, so over n ordinary requests at most `share * n + 1` extra ones are made.
    """

    def __init__(self, share: float, *, most: float = 10.0) -> None:
        self._share = share
        self._most = most
        self._saved = 1.0 if share else 0.0

    def earn(self) -> None:
        self._saved = min(self._most, self._saved + self._share)

    def spend(self) -> bool:
        """Whether an extra request may be made now."""
        if self._saved < 1:
            return False
        self._saved -= 1
        return True
