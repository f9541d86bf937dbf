"""Tracing: a span for each request and each of its phases, in the caller's trace when it sends a valid traceparent.

Names stand here and nowhere else. Spans carry numbers and ids, never text. They go where the provider's exporter sends them; without one,
they still give every reply its trace id.
"""

from collections.abc import Mapping

from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import SpanContext, Tracer, get_current_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

SNAPSHOT_ID = "rag.snapshot_id"
GENERATION = "rag.generation"
DEGRADED = "rag.degraded"
RETRIEVED_CHUNKS = "rag.retrieved_chunks"
SCORE_TOP1 = "rag.score_top1"

_PROPAGATOR = TraceContextTextMapPropagator()


def provider() -> TracerProvider:
    """A provider of this process' spans, without exporters."""
    return TracerProvider(resource=Resource.create({"service.name": "ragline"}))


def tracer(tracing: TracerProvider) -> Tracer:
    return tracing.get_tracer("ragline")


def context_of(headers: Mapping[str, str]) -> Context:
    """The caller's trace by its traceparent; a new one when there is none or it is malformed."""
    return _PROPAGATOR.extract({"traceparent": headers.get("traceparent", "")})


def outgoing_headers() -> dict[str, str]:
    """The header that makes a called service part of the current trace."""
    headers: dict[str, str] = {}
    _PROPAGATOR.inject(headers)
    return headers


def trace_id_of(context: SpanContext) -> str:
    """32 hex digits."""
    return format(context.trace_id, "032x")


def record(attributes: Mapping[str, str | int | float | tuple[str, ...]]) -> None:
    """Set attributes of the current span."""
    get_current_span().set_attributes(dict(attributes))
