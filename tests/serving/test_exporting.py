"""Where spans go: the tail rule, over a real OTLP endpoint; and a sink that hangs, refuses or is too slow harms nobody."""

import logging
import threading
import time

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from trace_sink import sink

from rag_serving import telemetry
from rag_serving.signals import contract, exporting, metrics, trace
from rag_serving.signals.exporting import TailSink

KEPT = f"00-{'ab' * 16}-{'cd' * 8}-01"
UNSAMPLED = f"00-{'ab' * 16}-{'cd' * 8}-00"


class Kept(SpanExporter):
    """Keeps span names; while closed, `export` waits. It can be told to refuse or to raise."""

    def __init__(self, *, result=SpanExportResult.SUCCESS, error: Exception | None = None) -> None:
        self.names: list[str] = []
        self.open = threading.Event()
        self.open.set()
        self.result = result
        self.error = error

    def export(self, spans):
        self.open.wait(30)
        if self.error:
            raise self.error
        self.names.extend(span.name for span in spans)
        return self.result

    def shutdown(self) -> None:
        self.open.set()


def provided(exporter: SpanExporter, *, share: float, slow_seconds: float = 60.0) -> tuple[TracerProvider, TailSink]:
    tail = TailSink(exporter, slow_seconds=slow_seconds)
    tracing = trace.provider(share=share)
    tracing.add_span_processor(tail)
    return tracing, tail


def served(tracing: TracerProvider, *, status: int = 200, code: str = "", traceparent: str = "", part: str = "") -> str:
    """One request with a phase inside, ended as told; its trace id."""
    with trace.serving(trace.tracer(tracing), "POST", "/v1/query", {"traceparent": traceparent}) as request:
        with trace.span(contract.ENCODE):
            pass
        if part:
            telemetry.degraded(part)
        request.status = status
        if code:
            telemetry.refused(code, status)
    return request.trace_id


def dropped() -> float:
    found = metrics.samples()
    return sum(value for (name, _), value in found.items() if name == "rag_spans_dropped_total")


@pytest.mark.parametrize(
    ("ending", "kept"),
    [
        ({}, False),
        ({"status": 422, "code": "empty_query"}, False),
        ({"status": 500, "code": "internal"}, True),
        ({"status": 504, "code": "deadline_exceeded"}, True),
        ({"status": 503, "code": "overloaded"}, True),
        ({"part": "embedding"}, True),
        ({"traceparent": KEPT}, True),
        ({"traceparent": UNSAMPLED}, False),
        ({"traceparent": UNSAMPLED, "status": 500, "code": "internal"}, True),
    ],
)
def test_the_tail_rule(ending, kept):
    """With a head sample of nothing, a trace is kept whole when it tells something or its caller wants it, and else forgotten whole."""
    exporter = Kept()
    tracing, tail = provided(exporter, share=0.0)
    served(tracing, **ending)
    assert tail.force_flush()
    assert exporter.names == (["encode", "POST /v1/query"] if kept else [])
    tracing.shutdown()


def test_slow_requests_are_kept():
    """A request that lasts as long as `slow_seconds` is kept, however well it ended."""
    exporter = Kept()
    tracing, tail = provided(exporter, share=0.0, slow_seconds=0.0)
    served(tracing)
    assert tail.force_flush()
    assert exporter.names == ["encode", "POST /v1/query"]
    tracing.shutdown()


def test_health_checks_are_no_traces():
    """An address without a span of its own is not sent, sampled or not, unless it broke: readiness that is not there yet is no failure."""
    exporter = Kept()
    tracing, tail = provided(exporter, share=1.0)
    for status in (200, 404, 503, 500):
        with trace.serving(trace.tracer(tracing), "GET", "/livez", {}) as request:
            request.status = status
    assert tail.force_flush()
    assert exporter.names == ["request"]
    tracing.shutdown()


def test_the_head_sample_keeps_its_share():
    """About the configured share of traces that begin here is kept, by trace id: of 4,000 between 8 and 12 % at 10 %."""
    exporter = Kept()
    tracing, tail = provided(exporter, share=0.1)
    for _ in range(4000):
        served(tracing)
    assert tail.force_flush()
    assert 320 <= exporter.names.count("POST /v1/query") <= 480
    tracing.shutdown()


def test_a_span_that_outlives_its_request_follows_its_trace():
    """What ends later, as a shadow answer does, is kept or forgotten with the trace it belongs to."""
    exporter = Kept()
    tracing, tail = provided(exporter, share=0.0)
    tracer = trace.tracer(tracing)
    for status in (200, 500):
        with trace.serving(tracer, "POST", "/v1/query", {}) as request:
            late = tracer.start_span("late")
            request.status = status
        late.end()
    assert tail.force_flush()
    assert exporter.names == ["POST /v1/query", "late"]
    tracing.shutdown()


def test_a_hanging_sink_delays_neither_requests_nor_the_end():
    """While the sink hangs, requests go on; what does not fit is dropped whole and counted, and shutdown returns."""
    exporter = Kept()
    exporter.open.clear()
    tracing, tail = provided(exporter, share=1.0)
    before = dropped()
    served(tracing)
    deadline = time.monotonic() + 20
    while tail._queue:  # the sending thread has taken it and hangs
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for _ in range(exporting.MOST_QUEUED):  # two spans each
        served(tracing)
    assert dropped() - before == exporting.MOST_QUEUED
    started = time.monotonic()
    tracing.shutdown()
    assert time.monotonic() - started < 4 * exporting.STOP_SECONDS
    assert dropped() - before == 2 * exporting.MOST_QUEUED
    exporter.open.set()


def test_unfinished_traces_are_bounded(monkeypatch):
    """Spans whose request never ends are held for so many traces and no more; the oldest are dropped and counted."""
    monkeypatch.setattr(exporting, "MOST_TRACES", 3)
    tracing, tail = provided(Kept(), share=1.0)
    tracer, before = trace.tracer(tracing), dropped()
    for _ in range(5):
        with tracer.start_as_current_span("never ended", end_on_exit=False), trace.span(contract.ENCODE, tracer=tracer):
            pass
    assert dropped() - before == 2
    assert len(tail._open) == 3
    tracing.shutdown()


@pytest.mark.parametrize("exporter", [Kept(result=SpanExportResult.FAILURE), Kept(error=RuntimeError("broken"))])
def test_refused_spans_are_counted_and_said_once(exporter, caplog):
    """A sink that refuses or breaks costs its spans; the log says so once, and again when it works."""
    tracing, tail = provided(exporter, share=1.0)
    before = dropped()
    with caplog.at_level(logging.WARNING, "rag_serving.signals.exporting"):
        for _ in range(3):
            served(tracing)
            assert tail.force_flush()
        assert dropped() - before == 6
        assert len(caplog.records) == 1
        exporter.result, exporter.error = SpanExportResult.SUCCESS, None
        served(tracing)
        assert tail.force_flush()
    assert len(caplog.records) == 2
    tracing.shutdown()


def test_spans_reach_an_otlp_endpoint(monkeypatch):
    """The standard variables name endpoint and headers; what arrives is one trace with its service's name, parent and attributes."""
    with sink() as collector:
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", collector.url)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "x-mlflow-experiment-id=7")
        tracing = trace.exporting_provider(service="ragline", share=1.0, slow_seconds=60.0)
        trace_id = served(tracing, part="embedding")
        assert tracing.force_flush()
        tracing.shutdown()
    child, root = collector.spans
    assert (child.name, root.name) == ("encode", "POST /v1/query")
    assert child.parent_span_id == root.span_id
    assert root.trace_id.hex() == child.trace_id.hex() == trace_id
    found = {each.key: each.value for each in root.attributes}
    assert found["rag.outcome"].string_value == "degraded"
    assert collector.services == {"ragline"}
    assert collector.headers[0]["x-mlflow-experiment-id"] == "7"


def test_without_an_endpoint_nothing_is_sent(monkeypatch):
    """No variable, or OTEL_TRACES_EXPORTER=none: no sink, and no thread for one."""
    for name in ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    assert exporting.otlp_sink(slow_seconds=1.0) is None
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    assert exporting.otlp_sink(slow_seconds=1.0) is None


def test_an_error_leaves_its_code_and_none_of_its_words():
    """What an exception says is on no span, in no event and in no status: it may hold what a user wrote."""
    spans = []

    class Seen(Kept):
        def export(self, batch):
            spans.extend(batch)
            return SpanExportResult.SUCCESS

    tracing, tail = provided(Seen(), share=1.0)
    tracer = trace.tracer(tracing)
    with pytest.raises(ValueError, match="secret"), trace.serving(tracer, "POST", "/v1/query", {}), trace.span(contract.ENCODE):
        raise ValueError("secret words")
    assert tail.force_flush()
    assert "secret" not in " ".join(span.to_json() for span in spans)
    assert [span.attributes["error.type"] for span in spans] == ["ValueError", "ValueError"]
    assert all(span.status.status_code is StatusCode.ERROR and not span.events for span in spans)
    tracing.shutdown()


def test_a_method_of_a_clients_own_making_is_other():
    """A method that HTTP does not know is a word of the client's: its span says `_OTHER`."""
    exporter, tracing = InMemorySpanExporter(), TracerProvider()
    tracing.add_span_processor(SimpleSpanProcessor(exporter))
    for method in ("PATCH", "SECRETWORD"):
        with trace.serving(trace.tracer(tracing), method, "/v1/query", {}) as request:
            request.status = 405
    spans = exporter.get_finished_spans()
    assert [span.attributes["http.request.method"] for span in spans] == ["PATCH", "_OTHER"]
    assert "SECRETWORD" not in "".join(span.to_json() for span in spans)
