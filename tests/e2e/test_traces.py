"""Traces and metrics where they are read: in a real MLflow, and in a real Prometheus that evaluates every rule and every panel."""

import httpx2
import mlflow_server
import pytest
from live_server import running
from real_prometheus import PROMETHEUS, watching
from small_service import build, release, settings_for

from rag_assets.platform import TRACES_EXPERIMENT, tracing
from rag_serving import app, embedder
from rag_serving.signals import contract, trace
from rag_serving.store import LocalStore

TRACE = "7e" * 16


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """A function that runs both services with the environment's sink, asks one question in a given trace, and gives what /metrics says."""
    store, settings = LocalStore(tmp_path / "store"), settings_for(tmp_path)
    release(store, build(store, settings))

    def ask(**environ: str) -> str:
        for name, value in {"NO_PROXY": "127.0.0.1", **environ}.items():
            monkeypatch.setenv(name, value)
        providers = [trace.exporting_provider(service=name, share=0.0, slow_seconds=60) for name in ("ragline-embedder", "ragline")]
        with running(embedder.create_app(settings, preload=["hashing"], tracing=providers[0]), ready_path="/readyz") as vectors:
            service = app.create_app(settings_for(tmp_path, embedder_url=vectors), store=store, tracing=providers[1])
            with running(service, ready_path="/readyz") as url:
                headers = {"traceparent": f"00-{TRACE}-{'cd' * 8}-01"}
                httpx2.post(f"{url}/v1/query", json={"query": "delete a bucket"}, headers=headers, trust_env=False).raise_for_status()
                text = httpx2.get(f"{url}/metrics", trust_env=False).text
        for provider in providers:
            assert provider.force_flush()
            provider.shutdown()
        return text

    return ask


@pytest.mark.heavy
@pytest.mark.timeout(300)
def test_a_trace_is_read_back_from_mlflow(asked, tmp_path, monkeypatch):
    """What `make up` tells the services makes MLflow's server show one trace with every span of both and what the first one found."""
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", raising=False)
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    template = mlflow_server.migrated(tmp_path)
    with mlflow_server.serving(template, port=mlflow_server.free_port()) as url:
        settings = settings_for(tmp_path)
        places = settings.places.model_copy(update={"mlflow_url": url})
        dropped = asked(**tracing(settings.model_copy(update={"places": places})))
        assert "rag_spans_dropped_total{" not in dropped
        body = {"locations": [{"type": "MLFLOW_EXPERIMENT", "mlflow_experiment": {"experiment_id": TRACES_EXPERIMENT}}]}
        found = httpx2.post(f"{url}/api/3.0/mlflow/traces/search", json=body, trust_env=False).json()["traces"]
        assert [trace["trace_id"] for trace in found] == [f"tr-{TRACE}"]
        whole = httpx2.get(f"{url}/api/3.0/mlflow/traces/get", params={"trace_id": f"tr-{TRACE}"}, trust_env=False).json()["trace"]
    spans = {span["name"]: span for span in whole["spans"]}
    assert len(whole["spans"]) >= 9
    assert {"POST /v1/query", "POST /v1/embeddings", "embeddings hashing", "retrieve.vector", "retrieve.fts", "fuse"} <= set(spans)
    names = {each["key"] for each in spans["POST /v1/query"]["attributes"]}
    assert {contract.QUERY_TOKENS.name, contract.RETRIEVED_CHUNKS.name, contract.CONTEXT_TOKENS.name, contract.OUTCOME.name} <= names


@pytest.mark.slow
@pytest.mark.skipif(not PROMETHEUS, reason="needs Prometheus: apt-get install prometheus")
def test_prometheus_evaluates_every_expression(tmp_path):
    """A real Prometheus scrapes the service, loads the rules without a complaint, and evaluates each rule and each panel."""
    store = LocalStore(tmp_path / "store")
    release(store, build(store, settings_for(tmp_path)))
    with (
        running(app.create_app(settings_for(tmp_path), store=store), ready_path="/readyz") as url,
        watching(tmp_path / "prometheus", [url]) as watch,
    ):
        httpx2.post(f"{url}/v1/query", json={"query": "delete a bucket"}, trust_env=False).raise_for_status()
        watch.until(lambda: watch.values('rag_requests_total{outcome="degraded"}') >= [1.0])
        for expr in [*(rule["query"] for rule in watch.rules()), *(expr for _, expr in watch.panels)]:
            watch.series(expr)
        assert {rule["health"] for rule in watch.rules()} <= {"ok", "unknown"}
