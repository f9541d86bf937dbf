"""One request on its way through the phases: its trace, its deadline, who asks, and what had to be done without."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from opentelemetry.trace import Tracer

from rag_serving.caller import ANONYMOUS, Caller
from rag_serving.deadline import Deadline
from rag_serving.errors import DeadlineExceeded

PHASES = ("admit", "encode", "retrieve", "rerank", "assemble", "generate")


@dataclass(slots=True)
class Exchange:
    """`timings_ms` has the milliseconds of each phase, in order; each phase is also a span. `degraded` names parts done without."""

    trace_id: str
    tracer: Tracer
    deadline: Deadline
    caller: Caller = ANONYMOUS
    request_id: str = ""
    timings_ms: dict[str, float] = field(default_factory=dict)
    degraded: list[str] = field(default_factory=list)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase and make its span; DeadlineExceeded instead of a start after the deadline."""
        if self.deadline.expired:
            raise DeadlineExceeded(f"the time for this request ended before {name}.", fix="Allow more time, or ask again.")
        started = time.perf_counter()
        try:
            with self.tracer.start_as_current_span(name):
                yield
        finally:
            self.timings_ms[name] = round((time.perf_counter() - started) * 1000, 3)

    def degrade(self, part: str) -> None:
        """Note that the answer had to do without a part: embedding, text_index, rerank or llm."""
        if part not in self.degraded:
            self.degraded.append(part)
