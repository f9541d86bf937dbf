"""Where spans go: kept or forgotten a trace at a time, and sent from a thread of their own that no request ever waits for.

The tail rule. A trace is kept when its caller or the head sample said so, and whatever they said when its request failed, was degraded, blocked
or shed, or was slow; the rest is forgotten, and so are health checks. It is decided when the process' first span of the trace ends, so spans
of another process that no sample chose are not there. What cannot be sent is dropped and counted.
"""

import logging
import os
import threading
from collections import OrderedDict, deque

from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.trace import StatusCode

from rag_serving.signals import metrics
from rag_serving.signals.contract import OUTCOME, REQUEST, SPANS_DROPPED, STATUS, Outcome
from rag_serving.signals.redaction import redacted_span

MOST_TRACES = 2000  # under way at once
MOST_SPANS = 256  # of one trace, until its request ends
MOST_QUEUED = 8192
BATCH = 512
PAUSE_SECONDS = 1.0
STOP_SECONDS = 1.5
ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
TELLING = frozenset({Outcome.DEGRADED, Outcome.BLOCKED, Outcome.SHED, Outcome.TIMEOUT, Outcome.ERROR})

log = logging.getLogger(__name__)


def worth_keeping(span: ReadableSpan, *, slow_seconds: float) -> bool:
    """The tail rule, of a process' first span of a trace."""
    context = span.get_span_context()
    attributes = span.attributes or {}
    if span.name == REQUEST.name:
        return attributes.get(STATUS.name) == 500
    if span.status.status_code is StatusCode.ERROR:
        return True
    if context and context.trace_flags.sampled:
        return True
    lasted = ((span.end_time or 0) - (span.start_time or 0)) / 1e9
    return attributes.get(OUTCOME.name) in TELLING or lasted >= slow_seconds


class TailSink(SpanProcessor):
    """Holds the spans of a trace until its request has ended, then sends or forgets them. `on_end` costs microseconds, whatever the sink does."""

    def __init__(self, exporter: SpanExporter, *, slow_seconds: float) -> None:
        self._exporter = exporter
        self._slow_seconds = slow_seconds
        self._open: OrderedDict[int, list[ReadableSpan]] = OrderedDict()
        self._decided: OrderedDict[int, bool] = OrderedDict()
        self._queue: deque[ReadableSpan] = deque()
        self._lock = threading.Lock()
        self._sending = threading.Lock()
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._failing = False
        self._thread = threading.Thread(target=self._send, name="spans", daemon=True)
        self._thread.start()

    def on_end(self, span: ReadableSpan) -> None:
        context = span.get_span_context()
        if context is None:
            return
        trace_id, first = context.trace_id, span.parent is None or span.parent.is_remote
        with self._lock:
            if not first:
                decided = self._decided.get(trace_id)
                if decided is None:
                    self._hold(trace_id, span)
                elif decided:
                    self._enqueue([span])  # it outlived its request
                return
            kept = worth_keeping(span, slow_seconds=self._slow_seconds)
            held = self._open.pop(trace_id, [])
            self._decided[trace_id] = kept
            if len(self._decided) > MOST_TRACES:
                self._decided.popitem(last=False)
            if kept:
                self._enqueue([*held, span])

    def _hold(self, trace_id: int, span: ReadableSpan) -> None:
        held = self._open.setdefault(trace_id, [])
        if len(held) < MOST_SPANS:
            held.append(span)
        else:
            metrics.count(SPANS_DROPPED, "queue_full")
        if len(self._open) > MOST_TRACES:
            metrics.count(SPANS_DROPPED, "queue_full", by=len(self._open.popitem(last=False)[1]))

    def _enqueue(self, spans: list[ReadableSpan]) -> None:
        room = MOST_QUEUED - len(self._queue)
        if room < len(spans):
            metrics.count(SPANS_DROPPED, "queue_full", by=len(spans))  # a trace goes whole or not at all
            return
        self._queue.extend(spans)
        if len(self._queue) >= BATCH:
            self._wake.set()

    def _send(self) -> None:
        while not self._stop.is_set() or self._queue:
            if not self._stop.is_set():
                self._wake.wait(PAUSE_SECONDS)
                self._wake.clear()
            self._drain()

    def _drain(self) -> None:
        with self._sending:
            while batch := self._next_batch():
                self._export(batch)

    def _next_batch(self) -> list[ReadableSpan]:
        with self._lock:
            return [self._queue.popleft() for _ in range(min(BATCH, len(self._queue)))]

    def _export(self, batch: list[ReadableSpan]) -> None:
        try:
            sent = self._exporter.export([redacted_span(span) for span in batch]) is SpanExportResult.SUCCESS
        except Exception:  # noqa: BLE001 - whatever the sink does, the next batch is tried
            sent = False
        if not sent:
            metrics.count(SPANS_DROPPED, "refused", by=len(batch))
        if sent is self._failing:
            self._failing = not sent
            log.warning("the sink of traces takes no spans; they are dropped" if self._failing else "the sink of traces takes spans again")

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        """Send what was decided so far; False when it took longer than that."""
        done = threading.Event()

        def flush() -> None:
            self._drain()
            done.set()

        threading.Thread(target=flush, name="spans-flush", daemon=True).start()
        return done.wait(timeout_millis / 1000)

    def shutdown(self) -> None:
        """Send what waits, for two seconds at most; what is left then is dropped and counted."""
        self._stop.set()
        self._wake.set()
        self._thread.join(STOP_SECONDS)
        with self._lock:
            left = len(self._queue)
            self._queue.clear()
        if left:
            metrics.count(SPANS_DROPPED, "shutdown", by=left)
        if not self._thread.is_alive():
            self._exporter.shutdown()


def otlp_sink(*, slow_seconds: float) -> TailSink | None:
    """A sink at the OTLP/HTTP endpoint that the standard variables name; None when they name none, or OTEL_TRACES_EXPORTER is none."""
    if not any(os.environ.get(name) for name in ENDPOINTS) or os.environ.get("OTEL_TRACES_EXPORTER") == "none":
        return None
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    logging.getLogger("opentelemetry.exporter").setLevel(logging.CRITICAL)  # a line a batch; ours says it once
    return TailSink(OTLPSpanExporter(), slow_seconds=slow_seconds)
