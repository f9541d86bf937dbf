"""Spans in the caller's trace, and the request of a user that they belong to: how they begin, end and are counted, by the declarations of `contract`.

Without a request under way (a warm-up, a shadow answer, an evaluation) there are spans and nothing is counted. Nothing recorded is text; an
exception leaves the code of its error on its span and no words.
"""

import asyncio
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from opentelemetry.context import Context, attach, detach
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import NoOpTracer, SpanContext, SpanKind, StatusCode, Tracer, get_current_span, set_span_in_context
from opentelemetry.trace import Span as OpenSpan
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from rag_serving.signals import contract, metrics
from rag_serving.signals.contract import Attribute, Metric, Outcome, Span
from rag_serving.signals.exporting import otlp_sink
from rag_serving.signals.spans import LightProvider

Value = str | int | float | bool | Sequence[str] | Sequence[float]

_PROPAGATOR = TraceContextTextMapPropagator()
_KINDS = {"server": SpanKind.SERVER, "client": SpanKind.CLIENT, "internal": SpanKind.INTERNAL}
_PHASES = {span.name: span for span in contract.PHASES}
_GUARDS = {"input": contract.GUARD_INPUT, "context": contract.GUARD_CONTEXT, "output": contract.GUARD_OUTPUT}
_ROUTES = {tuple(span.name.split()): span for span in contract.SPANS if " " in span.name}
_TIMED: dict[str, tuple[Metric, tuple[str, ...]]] = {
    **{span.name: (contract.PHASE_SECONDS, (span.name,)) for span in contract.PHASES},
    contract.RETRIEVE_VECTOR.name: (contract.RETRIEVE_SECONDS, ("vector",)),
    contract.RETRIEVE_FTS.name: (contract.RETRIEVE_SECONDS, ("fts",)),
    contract.FUSE.name: (contract.RETRIEVE_SECONDS, ("fuse",)),
    contract.EMBEDDINGS.name: (contract.EMBED_SECONDS, ()),
}
_METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"})  # others are a client's own words
_NO_TRACER = NoOpTracer()


@dataclass(slots=True)
class Request:
    """The request under way: its first span, and what its outcome will be made of."""

    span: OpenSpan
    trace_id: str
    route: str
    status: int | None = None
    code: str = ""
    abstained: bool = False
    blocked: bool = False
    gone: bool = False
    degraded: list[str] = field(default_factory=list)

    @property
    def outcome(self) -> Outcome:
        if self.code == "overloaded":
            return Outcome.SHED
        if self.status == 504:
            return Outcome.TIMEOUT
        if self.code == "injection" or (self.blocked and not self.degraded):
            return Outcome.BLOCKED
        if self.gone or (self.status and 400 <= self.status < 500):
            return Outcome.CLIENT_ERROR
        if self.status is None or self.status >= 500:
            return Outcome.ERROR
        return Outcome.DEGRADED if self.degraded else Outcome.ABSTAINED if self.abstained else Outcome.OK


_tracer: ContextVar[Tracer | None] = ContextVar("tracer", default=None)
_request: ContextVar[Request | None] = ContextVar("request", default=None)
_inflight: set[int] = set()


def current() -> Request | None:
    """The user's request that is under way here; what happens counts in the metrics only then."""
    return _request.get()


def provider(*, service: str = "ragline", share: float = 1.0) -> TracerProvider:
    """A provider of this process' spans, without exporters. `share` of the traces that begin here are sampled; all are recorded."""
    named = os.environ.get("OTEL_SERVICE_NAME") or service
    return LightProvider(share=share, resource=Resource.create({"service.name": named}))


def exporting_provider(*, service: str, share: float, slow_seconds: float) -> TracerProvider:
    """The same with a sink at the OTLP endpoint of the standard variables; OTEL_SERVICE_NAME overrides `service`.

    Where they name none, spans have their ids, for replies and logs, and nothing is recorded.
    """
    sink = otlp_sink(slow_seconds=slow_seconds)
    if sink is None:
        return TracerProvider(sampler=ALWAYS_OFF)
    made = provider(service=service, share=share)
    made.add_span_processor(sink)
    return made


def tracer(tracing: TracerProvider) -> Tracer:
    return tracing.get_tracer("ragline", schema_url=f"https://opentelemetry.io/schemas/{contract.SEMCONV}")


def context_of(headers: Mapping[str, str]) -> Context:
    """The caller's trace by its traceparent; a new one when there is none or it is malformed. Baggage is never read."""
    return _PROPAGATOR.extract({"traceparent": headers.get("traceparent", "")})


def outgoing_headers() -> dict[str, str]:
    """The header that makes a called service part of the current trace."""
    headers: dict[str, str] = {}
    _PROPAGATOR.inject(headers)
    return headers


def trace_id_of(context: SpanContext) -> str:
    """32 hex digits."""
    return format(context.trace_id, "032x")


def record(attributes: Mapping[Attribute, Value]) -> None:
    """Set attributes of the span under way."""
    get_current_span().set_attributes({attribute.name: value for attribute, value in attributes.items()})


def note(attributes: Mapping[Attribute, Value]) -> None:
    """Set attributes of the request's first span, whichever is under way."""
    request = _request.get()
    if request is not None:
        request.span.set_attributes({attribute.name: value for attribute, value in attributes.items()})


def declared(method: str, path: str) -> bool:
    """Whether requests to that address have a span of their own."""
    return (method, path) in _ROUTES


def inflight() -> int:
    """Requests under way in this process."""
    return len(_inflight)


@contextmanager
def span(declared: Span, *, model: str = "", tracer: Tracer | None = None) -> Iterator[OpenSpan]:
    """A declared span inside the one under way, timed; `tracer` is used by the spans inside too."""
    token = _tracer.set(tracer) if tracer else None
    name = f"{declared.name} {model}" if model else declared.name
    started = time.perf_counter()
    try:
        made = (_tracer.get() or _NO_TRACER).start_span(name, kind=_KINDS[declared.kind])
        outer = attach(set_span_in_context(made))  # what start_as_current_span does, without its context manager
        try:
            yield made
        except BaseException as error:
            made.set_attribute(contract.ERROR_TYPE.name, getattr(error, "code", None) or type(error).__name__)
            made.set_status(StatusCode.ERROR)
            raise
        finally:
            detach(outer)
            made.end()
    finally:
        if token is not None:
            _tracer.reset(token)
        if declared.name in _TIMED and _request.get() is not None:
            metric, labels = _TIMED[declared.name]
            metrics.observe(metric, time.perf_counter() - started, *labels)


@contextmanager
def phase(name: str, *, tracer: Tracer) -> Iterator[None]:
    """The span of a phase of a request, by its name."""
    with span(_PHASES[name], tracer=tracer):
        yield


@contextmanager
def serving(tracer: Tracer, method: str, path: str, headers: Mapping[str, str]) -> Iterator[Request]:
    """The first span of a request, in its caller's trace. Whoever replies sets `status`; the outcome is recorded and counted at the end."""
    declared = _ROUTES.get((method, path), contract.REQUEST)
    route = path if declared is not contract.REQUEST else ""
    started = time.perf_counter()
    made = tracer.start_span(declared.name, context_of(headers), kind=SpanKind.SERVER)
    outer = attach(set_span_in_context(made))
    request = Request(made, trace_id_of(made.get_span_context()), route)
    tokens = _tracer.set(tracer), _request.set(request)
    _inflight.add(id(request))
    try:
        yield request
    except asyncio.CancelledError:
        request.gone = True
        raise
    except Exception as error:
        made.set_attribute(contract.ERROR_TYPE.name, type(error).__name__)
        raise
    finally:
        _inflight.discard(id(request))
        _tracer.reset(tokens[0])
        _request.reset(tokens[1])
        _ended(request, method, time.perf_counter() - started)
        detach(outer)
        made.end()


def _ended(request: Request, method: str, seconds: float) -> None:
    outcome = request.outcome
    ended: dict[Attribute, Value] = {contract.METHOD: method if method in _METHODS else "_OTHER", contract.OUTCOME: outcome.value}
    if request.route:
        ended[contract.ROUTE] = request.route
    if request.status is not None:
        ended[contract.STATUS] = request.status
    if request.code:
        ended[contract.ERROR_TYPE] = request.code
    if request.degraded:
        ended[contract.DEGRADED] = tuple(request.degraded)
    request.span.set_attributes({attribute.name: value for attribute, value in ended.items()})
    if outcome in (Outcome.ERROR, Outcome.TIMEOUT):
        request.span.set_status(StatusCode.ERROR)
    if request.route in contract.ROUTES:
        kept = request.span.get_span_context().trace_flags.sampled or outcome in (Outcome.ERROR, Outcome.DEGRADED)
        metrics.count(contract.REQUESTS, request.route, outcome)
        metrics.observe(contract.REQUEST_SECONDS, seconds, request.route, outcome, trace_id=request.trace_id if kept else "")


@contextmanager
def guarding(guard: str, *, tracer: Tracer | None = None) -> Iterator[None]:
    """The span of a guard at work: input, context or output."""
    with span(_GUARDS[guard], tracer=tracer):
        yield
