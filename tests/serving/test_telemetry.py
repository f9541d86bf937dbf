"""Tracing over real sockets: one trace from the caller to the embedding service, a span a phase, no text."""

import httpx2
import pytest
from live_server import running
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from small_service import build, release, settings_for
from trace_sink import sink

from rag_serving import embedder
from rag_serving.app import create_app
from rag_serving.signals import contract, trace
from rag_serving.store import LocalStore

CALLER = "0af7651916cd43dd8448eb211c80319c"
PHASES = ["admit", "guard.input", "encode", "retrieve", "assemble", "generate"]


@pytest.fixture
def asked(tmp_path):
    """A function that asks one question with headers and returns the reply, the finished spans, and what the embedder was sent."""
    store, exporter, sent = LocalStore(tmp_path), InMemorySpanExporter(), []
    tracing = trace.provider()
    tracing.add_span_processor(SimpleSpanProcessor(exporter))
    settings = settings_for(tmp_path)
    release(store, build(store, settings))
    service = embedder.create_app(settings, preload=["hashing"])

    async def overheard(scope, receive, send):
        if scope.get("path") == "/v1/embeddings":
            sent.append({name.decode(): value.decode() for name, value in scope["headers"]})
        await service(scope, receive, send)

    with running(overheard, ready_path="/readyz") as url:
        app = create_app(settings_for(tmp_path, embedder_url=url), store=store, tracing=tracing)
        with running(app, ready_path="/readyz") as base:
            exporter.clear()

            def ask(**headers):
                reply = httpx2.post(f"{base}/v1/query", json={"query": "delete a secret-word bucket"}, headers=headers, trust_env=False)
                return reply.json(), [span for span in exporter.get_finished_spans() if span.name != "request"], sent

            yield ask
    tracing.shutdown()


def test_one_trace_from_the_caller_through_every_phase_to_the_embedder(asked):
    """The caller's trace id is on the root span, on each phase below it, in the reply, and in what the embedding service was sent."""
    reply, spans, sent = asked(traceparent=f"00-{CALLER}-b7ad6b7169203331-01")
    root = next(span for span in spans if span.name == "POST /v1/query")
    assert [span.name for span in spans if span.parent and span.parent.span_id == root.context.span_id] == PHASES
    assert {trace.trace_id_of(span.context) for span in spans} == {CALLER} == {reply["trace_id"]}
    assert sent[-1]["traceparent"].split("-")[1] == CALLER
    assert root.attributes[contract.SNAPSHOT_ID.name] == reply["snapshot_id"]
    assert root.attributes[contract.GENERATION.name] == reply["release"]
    assert root.attributes[contract.RETRIEVED_CHUNKS.name] == len(reply["hits"])
    retrieve = next(span for span in spans if span.name == "retrieve")
    assert retrieve.attributes[contract.SCORE_TOP1.name] == pytest.approx(reply["hits"][0]["score"])


@pytest.mark.parametrize("header", ["", "garbage", "00-" + "0" * 32 + "-b7ad6b7169203331-01", "00-" + "x" * 10_000])
def test_a_malformed_traceparent_starts_a_new_trace(asked, header):
    """Nothing of a malformed traceparent is believed; the reply still has a trace id."""
    reply, _, _ = asked(traceparent=header)
    assert len(reply["trace_id"]) == 32
    assert int(reply["trace_id"], 16) > 0


def test_spans_carry_no_text(asked):
    """Neither the question nor a passage stands in any span."""
    _, spans, _ = asked()
    assert "secret-word" not in " ".join(f"{span.name} {dict(span.attributes)}" for span in spans)


@pytest.mark.parametrize("service", ["query", "embedder"])
def test_the_framework_records_nothing_of_its_own(tmp_path, monkeypatch, service):
    """FastAPI can be told by a variable to send whole addresses and the words of exceptions to the OTLP endpoint; from our services it does not."""
    settings = settings_for(tmp_path)
    with sink() as collector:
        monkeypatch.setenv("FASTAPI_OTEL_AUTO_CONFIGURE", "true")
        for signal in ("TRACES", "METRICS", "LOGS"):
            monkeypatch.setenv(f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT", collector.url)
        app = create_app(settings, tracing=trace.provider()) if service == "query" else embedder.create_app(settings, preload=[])
        with running(app, ready_path="/livez") as url:
            httpx2.get(f"{url}/livez?secret=word", trust_env=False)
        assert collector.raw == []
