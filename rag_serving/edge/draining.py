"""A server that says it is going before it goes, so that whoever shares out requests has time to send them elsewhere."""

import threading
from collections.abc import Callable
from types import FrameType

import uvicorn


class DrainingServer(uvicorn.Server):
    """At the first SIGTERM or SIGINT calls `drain`, goes on serving for `seconds`, then ends as uvicorn does; at the second, at once."""

    def __init__(self, config: uvicorn.Config, *, seconds: float, drain: Callable[[], None]) -> None:
        super().__init__(config)
        self._seconds = seconds
        self._drain = drain
        self._draining = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._draining or not self.started:
            super().handle_exit(sig, frame)
            return
        self._draining = True
        self._drain()
        timer = threading.Timer(self._seconds, super().handle_exit, (sig, frame))
        timer.daemon = True
        timer.start()
