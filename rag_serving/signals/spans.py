"""Spans of requests, as light as their rate asks: the SDK's provider, with a tracer and a span of our own in it.

The SDK's span takes a lock for every attribute, and its sampler is asked for every child: 20 microseconds a span, of which a request has a dozen,
and most traces are forgotten. Here an attribute is an entry of a dict, and a trace is sampled once.
"""

from collections.abc import Mapping
from time import time_ns
from typing import Any

from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace import Tracer as SdkTracer
from opentelemetry.sdk.trace.sampling import TraceIdRatioBased
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import (
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    Tracer,
    get_current_span,
    use_span,
)
from opentelemetry.util.types import Attributes, AttributeValue

_LOW = TraceIdRatioBased.TRACE_ID_LIMIT
_UNSET = Status(StatusCode.UNSET)


class LightSpan(Span):
    """A span of declared attributes and a status, handed to the provider's processors when it ends; what is set later is ignored.

    It keeps no events: no words of an exception are recorded anywhere. Attributes are not checked; `contract` declares their types.
    """

    def __init__(self, tracer: "LightTracer", name: str, context: SpanContext, *, parent: SpanContext | None, kind: SpanKind) -> None:
        self._tracer = tracer
        self._name = name
        self._context = context
        self._parent = parent
        self._kind = kind
        self._attributes: dict[str, AttributeValue] = {}
        self._status = _UNSET
        self._ended = False
        self._started = time_ns()

    def get_span_context(self) -> SpanContext:
        return self._context

    def is_recording(self) -> bool:
        return not self._ended

    def set_attribute(self, key: str, value: Any) -> None:
        if not self._ended:
            self._attributes[key] = value

    def set_attributes(self, attributes: Mapping[str, Any]) -> None:
        if not self._ended:
            self._attributes.update(attributes)

    def set_status(self, status: Status | StatusCode, description: str | None = None) -> None:
        if not self._ended:
            self._status = status if isinstance(status, Status) else Status(status, description)

    def update_name(self, name: str) -> None:
        if not self._ended:
            self._name = name

    def add_event(self, name: str, attributes: Attributes = None, timestamp: int | None = None) -> None:
        """Not kept."""

    def record_exception(self, *_: Any, **__: Any) -> None:
        """Not kept."""

    def end(self, end_time: int | None = None) -> None:
        if self._ended:
            return
        self._ended = True
        self._tracer.sdk.span_processor.on_end(
            ReadableSpan(
                self._name,
                self._context,
                self._parent,
                self._tracer.sdk.resource,
                self._attributes,
                kind=self._kind,
                status=self._status,
                start_time=self._started,
                end_time=end_time or time_ns(),
                instrumentation_scope=self._tracer.scope,
            )
        )


class LightTracer(Tracer):
    """Makes light spans with the ids, the resource and the processors of the SDK's tracer.

    A trace that begins here is sampled by its id, one that a caller began as the caller says. Either is recorded, so that the tail rule can choose.
    """

    def __init__(self, sdk: SdkTracer, scope: InstrumentationScope, *, share: float) -> None:
        self.sdk = sdk
        self.scope = scope
        self._bound = TraceIdRatioBased.get_bound_for_rate(share)

    def start_span(self, name: str, context: Context | None = None, kind: SpanKind = SpanKind.INTERNAL, *_: Any, **__: Any) -> Span:
        """A span in the trace of `context`; the interface's further arguments have no use here."""
        parent, ids = get_current_span(context).get_span_context(), self.sdk.id_generator
        if parent.is_valid:
            made = SpanContext(parent.trace_id, ids.generate_span_id(), False, parent.trace_flags, parent.trace_state)
            return LightSpan(self, name, made, parent=parent, kind=kind)
        trace_id = ids.generate_trace_id()
        sampled = TraceFlags.SAMPLED if trace_id & _LOW < self._bound else TraceFlags.DEFAULT
        flags = TraceFlags(sampled | TraceFlags.RANDOM_TRACE_ID)
        return LightSpan(self, name, SpanContext(trace_id, ids.generate_span_id(), False, flags), parent=None, kind=kind)

    def start_as_current_span(self, *args: Any, end_on_exit: bool = True, **named: Any) -> Any:
        """A context manager, within which the span is the current one."""
        made = self.start_span(*args, **named)
        return use_span(made, end_on_exit=end_on_exit, record_exception=False, set_status_on_exception=False)


class LightProvider(TracerProvider):
    """The SDK's provider, whose tracers make light spans, and sample `share` of the traces that begin here."""

    def __init__(self, *, share: float, resource: Resource) -> None:
        super().__init__(resource=resource)
        self._share = share

    def get_tracer(
        self,
        instrumenting_module_name: str,
        instrumenting_library_version: str | None = None,
        schema_url: str | None = None,
        attributes: Attributes = None,
    ) -> Tracer:
        made = super().get_tracer(instrumenting_module_name, instrumenting_library_version, schema_url, attributes)
        if not isinstance(made, SdkTracer):  # switched off by OTEL_SDK_DISABLED
            return made
        scope = InstrumentationScope(instrumenting_module_name, instrumenting_library_version, schema_url, attributes)
        return LightTracer(made, scope, share=self._share)
