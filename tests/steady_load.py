"""Requests at a steady rate over plain sockets, whether or not the earlier ones are answered: the part of a client that costs least."""

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from evals.bench.connections import Connections


@dataclass(frozen=True)
class Asked:
    """One request as a client saw it: monotonic times, status (0: no reply, `error` says of which kind) and the bytes of the reply's body."""

    sent: float
    received: float
    status: int
    raw: bytes = b""
    error: str = ""

    @property
    def seconds(self) -> float:
        return self.received - self.sent

    @cached_property
    def body(self) -> dict[str, Any]:
        """Read when the load is over, since reading costs as much as asking."""
        return json.loads(self.raw) if self.raw else {}

    @property
    def code(self) -> str:
        """Of the refusal, or of what broke; empty for an answer."""
        return self.error or self.body.get("code", "")


async def ask(connections: Connections, question: str) -> Asked:
    """One question to /v1/query."""
    sent = time.monotonic()
    try:
        async with asyncio.timeout(20):
            status, raw = await connections.post("/v1/query", json.dumps({"query": question}).encode())
    except (OSError, EOFError, TimeoutError, ValueError) as error:
        return Asked(sent, time.monotonic(), 0, error=type(error).__name__)
    return Asked(sent, time.monotonic(), status, raw)


async def steady(url: str, questions: Callable[[int], str], *, a_second: float, until: Callable[[], bool]) -> list[Asked]:
    """`questions(0)`, `questions(1)` and so on at that rate until told to end; all of them, by the time they were sent."""
    connections, under_way = Connections(url), []
    started = time.monotonic()
    while not until():
        under_way.append(asyncio.create_task(ask(connections, questions(len(under_way)))))
        await asyncio.sleep(max(0.0, started + len(under_way) / a_second - time.monotonic()))
    asked = sorted(await asyncio.gather(*under_way), key=lambda each: each.sent)
    await connections.aclose()
    return asked
