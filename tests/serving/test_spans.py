"""Light spans are the SDK's spans to whoever reads them."""

import pytest
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, StatusCode, TraceFlags, get_current_span, set_span_in_context

from rag_serving.signals.spans import LightProvider

RESOURCE = Resource({"service.name": "tested"})
CALLER = SpanContext(7 << 64, 5, is_remote=True, trace_flags=TraceFlags(TraceFlags.SAMPLED))


def recorded(provider: TracerProvider, context: Context | None = None):
    """A span and one inside it, the inner one first."""
    exporter = InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = provider.get_tracer("rag", "1", schema_url="https://opentelemetry.io/schemas/1.0.0")
    with tracer.start_as_current_span("outer", context, kind=SpanKind.SERVER) as outer:
        outer.set_attributes({"a": 1, "b": ("x", "y")})
        with tracer.start_as_current_span("inner") as inner:
            inner.update_name("within")
            inner.set_attribute("c", 0.5)
            inner.set_status(StatusCode.ERROR)
            assert inner.is_recording()
        inner.set_attribute("late", True)
        inner.set_attributes({"late": True})
        inner.set_status(StatusCode.OK)
        inner.update_name("late")
        inner.end()
        assert not inner.is_recording()
        assert get_current_span() is outer
    provider.shutdown()
    return exporter.get_finished_spans()


def shown(span, ids):
    """What an exporter reads of a span; ids as the order in which they were met."""
    context, parent = span.get_span_context(), span.parent
    return (
        span.name,
        span.kind,
        dict(span.attributes),
        span.status.status_code,
        [ids.setdefault(each, len(ids)) for each in (context.trace_id, context.span_id, *([parent.span_id] if parent else []))],
        (context.is_remote, context.trace_flags, context.trace_state),
        parent and parent.is_remote,
        span.resource,
        span.instrumentation_scope,
        (span.events, span.links),
        0 < span.start_time <= span.end_time,
    )


@pytest.mark.parametrize("context", [None, set_span_in_context(NonRecordingSpan(CALLER))], ids=["begun here", "a caller's"])
def test_a_light_span_reads_as_the_sdks(context, recwarn):
    """Names, kinds, attributes, status, parents, sampling, resource, scope and order are equal; after its end a span stays as it is."""
    light, sdk = (
        [shown(span, ids) for span in recorded(provider, context)]
        for provider, ids in ((LightProvider(share=1.0, resource=RESOURCE), {}), (TracerProvider(resource=RESOURCE), {}))
    )
    assert light == sdk


def fail(provider: TracerProvider) -> None:
    with provider.get_tracer("rag").start_as_current_span("failing") as span:
        span.record_exception(ValueError("secret"))
        span.add_event("secret")
        raise ValueError("secret")


def test_no_words_of_an_exception_are_kept():
    """Neither an exception that passes through a span, nor one that is recorded on it, nor an event leaves anything."""
    exporter, provider = InMemorySpanExporter(), LightProvider(share=1.0, resource=RESOURCE)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with pytest.raises(ValueError, match="secret"):
        fail(provider)
    assert "secret" not in exporter.get_finished_spans()[0].to_json()
    provider.shutdown()


def test_a_caller_decides_for_its_trace():
    """A trace that a caller began is sampled as the caller says, whatever the share."""
    for flags, share in ((TraceFlags.SAMPLED, 0.0), (TraceFlags.DEFAULT, 1.0)):
        given = SpanContext(7 << 64, 5, is_remote=True, trace_flags=TraceFlags(flags))
        span = (
            LightProvider(share=share, resource=RESOURCE).get_tracer("rag").start_span("its", set_span_in_context(NonRecordingSpan(given)))
        )
        assert (span.get_span_context().trace_flags, span.is_recording()) == (flags, True)


def test_the_standard_switch_turns_them_off(monkeypatch):
    """With OTEL_SDK_DISABLED nothing is recorded."""
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    tracer = LightProvider(share=1.0, resource=RESOURCE).get_tracer("rag")
    with tracer.start_as_current_span("nothing") as span:
        assert not span.is_recording()
