"""The trace of a Dagster run: the run, its steps below it, and below each step what it did.

The ids of a run's trace follow from the run's id, so steps in any process join the same tree and nobody has to hand a context on: the trace id is
the run id without its dashes. Spans go where the standard OTEL variables say. A sink that does not answer costs a run two seconds at most.
"""

import hashlib
import logging
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context
from opentelemetry.trace import Span as OpenSpan

from rag_serving.signals import contract, trace, work
from rag_serving.signals.exporting import otlp_sink

SERVICE = "ragline-pipeline"
STEP_SECONDS = 1.0  # that a step in a process of its own waits for its spans to leave, and
RUN_SECONDS = 0.5  # that a run waits at its end
LATE_SECONDS = 0.05  # either, once the sink was late
_SAMPLED = TraceFlags(TraceFlags.SAMPLED)

log = logging.getLogger(__name__)


class _RunIds(RandomIdGenerator):
    """Random ids, but for those that were given."""

    def generate_trace_id(self) -> int:
        given = _given.get()
        return given[0] if given else super().generate_trace_id()

    def generate_span_id(self) -> int:
        given = _given.get()
        return given[1] or super().generate_span_id() if given else super().generate_span_id()

    def is_trace_id_random(self) -> bool:
        return False


@dataclass(slots=True)
class _Recorder:
    """What records in this process, and whether its sink was late the last time."""

    provider: TracerProvider
    process: int
    late: bool = False


_given: ContextVar[tuple[int, int] | None] = ContextVar("given", default=None)
_recorder: _Recorder | None = None
_open: set[str] = set()


def pipeline_provider() -> TracerProvider:
    """A provider that keeps every span of every run, without a sink. OTEL_SERVICE_NAME overrides `ragline-pipeline`."""
    resource = Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME") or SERVICE})
    return TracerProvider(sampler=ALWAYS_ON, resource=resource, id_generator=_RunIds(), shutdown_on_exit=False)


@contextmanager
def recording_to(provider: TracerProvider) -> Iterator[None]:
    """Within the block the runs of this process are recorded by this provider, made by `pipeline_provider`, and not by the environment's."""
    global _recorder  # noqa: PLW0603 - one a process, as the environment is
    before, _recorder = _recorder, _Recorder(provider, os.getpid())
    try:
        yield
    finally:
        _recorder = before


def trace_id_of_run(run_id: str) -> str:
    """32 hex digits: the run id without dashes, or a hash of one that is no UUID."""
    return format(_ids_of(run_id)[0], "032x")


@contextmanager
def run(run_id: str, *, job: str, partition: str | None = None) -> Iterator[OpenSpan]:
    """The first span of a run's trace, recorded by the process that executes the run. Mark it with `work.failed` when a step failed.

    It is not made current: what happens within finds it by its ids. At its end every span has left this process, or 0.5 s have passed.
    """
    made = _first_span(run_id, job=job, partition=partition)
    _open.add(run_id)
    try:
        yield made
    except BaseException as error:
        work.failed(made, error)
        raise
    finally:
        _open.discard(run_id)
        made.end()
        if not flush(RUN_SECONDS):
            log.warning("not every span of run %s was sent in time", run_id)


def lost(run_id: str, *, job: str, partition: str | None, started: float) -> None:
    """Record the first span of a run that began at the Unix time `started` and whose process was killed: its steps hang from it."""
    made = _first_span(run_id, job=job, partition=partition, start_time=round(started * 1e9))
    made.set_attribute(contract.ERROR_TYPE.name, "killed")
    work.failed(made)
    made.end()


@contextmanager
def step(run_id: str, key: str, *, assets: Sequence[str] = (), partition: str | None = None, joins: bool) -> Iterator[OpenSpan]:
    """The span of a step, below its run's. With `joins` false no process records the run's, so the step is a first span of its trace."""
    facts: dict[contract.Attribute, work.Value] = {contract.RUN_ID: run_id, contract.STEP_KEY: key}
    if assets:
        facts[contract.ASSETS] = tuple(assets)
    if partition:
        facts[contract.PARTITION] = partition
    trace_id, span_id = _ids_of(run_id)
    # as a remote parent: a step's spans are sent when it ends and not with the run
    of_run = SpanContext(trace_id, span_id, is_remote=True, trace_flags=_SAMPLED)
    parent = set_span_in_context(NonRecordingSpan(of_run), Context()) if joins else Context()
    token = _given.set((trace_id, 0))
    try:
        with work.step(trace.tracer(_recording().provider), key, facts, parent=parent) as made:
            yield made
    finally:
        _given.reset(token)


def recorded_here(run_id: str) -> bool:
    """Whether this process records the span of that run, and so sends what its steps record until the run ends."""
    return run_id in _open


def execute(job: Any, *, partition_key: str | None = None, **options: Any) -> Any:
    """`job.execute_in_process(...)` within the span of its run: the same result, and the same errors."""
    run_id = str(uuid.uuid4())
    with run(run_id, job=job.name, partition=partition_key) as made:
        result = job.execute_in_process(run_id=run_id, partition_key=partition_key, **options)
        if not result.success:
            work.failed(made)
        return result


def flush(seconds: float) -> bool:
    """Wait until every ended span has left this process; False when it took longer. A sink that was late is not waited for again."""
    recorder = _recording()
    sent = recorder.provider.force_flush(round((LATE_SECONDS if recorder.late else seconds) * 1000))
    recorder.late = not sent
    return sent


def _first_span(run_id: str, *, job: str, partition: str | None, start_time: int | None = None) -> OpenSpan:
    facts = {contract.RUN_ID.name: run_id, contract.JOB.name: job}
    if partition:
        facts[contract.PARTITION.name] = partition
    token = _given.set(_ids_of(run_id))
    try:
        tracer = trace.tracer(_recording().provider)
        return tracer.start_span(f"{contract.RUN.name} {job}", Context(), attributes=facts, start_time=start_time)
    finally:
        _given.reset(token)


def _recording() -> _Recorder:
    global _recorder  # noqa: PLW0603 - made when it is first needed, once a process
    if _recorder is None or _recorder.process != os.getpid():
        provider = pipeline_provider()
        sink = otlp_sink(slow_seconds=0.0)
        if sink is not None:
            provider.add_span_processor(sink)
        _recorder = _Recorder(provider, os.getpid())
    return _recorder


def _ids_of(run_id: str) -> tuple[int, int]:
    """The trace id of a run and the id of its first span, neither of them 0."""
    digest = hashlib.sha256(run_id.encode()).digest()
    try:
        trace_id = uuid.UUID(run_id).int
    except ValueError:
        trace_id = int.from_bytes(digest[:16])
    return trace_id or 1, int.from_bytes(digest[16:24]) or 1
