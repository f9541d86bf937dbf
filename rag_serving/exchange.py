"""One request on its way through the phases: its trace, its deadline, who asks, and what had to be done without."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from opentelemetry.trace import Tracer

from rag_serving import telemetry
from rag_serving.deadline import Deadline
from rag_serving.edge.caller import ANONYMOUS, Caller
from rag_serving.errors import DeadlineExceeded
from rag_serving.guards import Event
from rag_serving.signals import trace

PHASES = ("admit", "encode", "retrieve", "rerank", "assemble", "generate")


class Listener(Protocol):
    """Who hears of an answer while it is made: what it rests on, then its text. Whatever is found or dropped later replaces what was heard."""

    async def found(self, found: Any) -> None: ...
    async def wrote(self, text: str) -> None: ...
    async def dropped(self) -> None: ...


@dataclass(slots=True)
class Exchange:
    """`timings_ms` has the milliseconds of each phase, in order; each phase is also a span. `degraded` names parts done without.

    `guards` has what guards did, in order. All requests of one `conversation` are led to the same snapshot while a canary is tried.
    """

    trace_id: str
    tracer: Tracer
    deadline: Deadline
    caller: Caller = ANONYMOUS
    request_id: str = ""
    conversation: str = ""
    timings_ms: dict[str, float] = field(default_factory=dict)
    degraded: list[str] = field(default_factory=list)
    guards: list[Event] = field(default_factory=list)
    listener: Listener | None = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase and make its span; DeadlineExceeded instead of a start after the deadline."""
        if self.deadline.expired:
            raise DeadlineExceeded(f"the time for this request ended before {name}.", fix="Allow more time, or ask again.")
        started = time.perf_counter()
        try:
            with trace.phase(name, tracer=self.tracer):
                yield
        finally:
            self.timings_ms[name] = round((time.perf_counter() - started) * 1000, 3)

    def degrade(self, part: str) -> None:
        """Note that the answer had to do without a part: embedding, text_index, vector_index, rerank or llm."""
        if part not in self.degraded:
            self.degraded.append(part)
            telemetry.degraded(part)

    def guarded(self, events: Iterable[Event]) -> None:
        """Note what guards did."""
        noted = tuple(events)
        self.guards.extend(noted)
        telemetry.guarded([(event.guard, event.rule, event.action, event.count) for event in noted])

    async def found(self, found: Any) -> None:
        """Tell the listener, if there is one, what the answer will rest on."""
        if self.listener is not None:
            await self.listener.found(found)

    async def wrote(self, text: str) -> None:
        """Tell it the next piece of the answer."""
        if self.listener is not None and text:
            await self.listener.wrote(text)

    async def dropped(self) -> None:
        """Tell it that the pieces so far do not count."""
        if self.listener is not None:
            await self.listener.dropped()
