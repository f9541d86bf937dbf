"""Traces and metrics where they are read: in a real MLflow, and in a real Prometheus that evaluates every rule and every panel."""

import json
import runpy
import shutil
import subprocess
import time

import httpx2
import mlflow_server
import pytest
import yaml
from conftest import ROOT
from live_server import running
from small_service import build, release, settings_for

from rag_assets.platform import TRACES_EXPERIMENT, tracing
from rag_serving import app, embedder, telemetry
from rag_serving.signals import contract
from rag_serving.store import LocalStore

PROMETHEUS = shutil.which("prometheus") or ""
TRACE = "7e" * 16


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """A function that runs both services with the environment's sink, asks one question in a given trace, and gives what /metrics says."""
    store, settings = LocalStore(tmp_path / "store"), settings_for(tmp_path)
    release(store, build(store, settings))

    def ask(**environ: str) -> str:
        for name, value in {"NO_PROXY": "127.0.0.1", **environ}.items():
            monkeypatch.setenv(name, value)
        providers = [telemetry.exporting_provider(service=name, share=0.0, slow_seconds=60) for name in ("ragline-embedder", "ragline")]
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
    generate = runpy.run_path(str(ROOT / "deploy" / "generate.py"))
    rules, board = generate["generated"]()[generate["RULES"]], json.loads(generate["generated"]()[generate["DASHBOARD"]])
    panels = [target["expr"] for panel in board["panels"] if panel["type"] != "row" for target in panel["targets"]]
    expressions = [rule["expr"] for group in yaml.safe_load(rules)["groups"] for rule in group["rules"]] + panels
    (tmp_path / "rules.yml").write_text(rules, encoding="utf-8")
    store = LocalStore(tmp_path / "store")
    release(store, build(store, settings_for(tmp_path)))
    with running(app.create_app(settings_for(tmp_path), store=store), ready_path="/readyz") as url:
        httpx2.post(f"{url}/v1/query", json={"query": "delete a bucket"}, trust_env=False).raise_for_status()
        scrape = {"job_name": "ragline", "static_configs": [{"targets": [url.removeprefix("http://")]}]}
        described = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": ["rules.yml"],
            "scrape_configs": [scrape],
        }
        (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(described), encoding="utf-8")
        port = mlflow_server.free_port()
        flags = [
            f"--config.file={tmp_path}/prometheus.yml",
            f"--storage.tsdb.path={tmp_path}/data",
            f"--web.listen-address=127.0.0.1:{port}",
        ]
        with (tmp_path / "log").open("wb") as log:
            process = subprocess.Popen([PROMETHEUS, *flags], stdout=log, stderr=log)
        try:
            with httpx2.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:

                def value(expr: str):
                    reply = client.get("/api/v1/query", params={"query": expr})
                    assert reply.status_code == 200, (expr, reply.text)
                    return reply.json()["data"]["result"]

                _until(lambda: value("rag_requests_total"))
                for expr in expressions:
                    value(expr)
                assert float(value('rag_requests_total{outcome="degraded"}')[0]["value"][1]) >= 1
                groups = client.get("/api/v1/rules").json()["data"]["groups"]
                assert {rule["health"] for group in groups for rule in group["rules"]} <= {"ok", "unknown"}
        finally:
            process.terminate()
            process.wait(timeout=20)


def _until(holds) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            if holds():
                return
        except httpx2.TransportError:
            pass
        assert time.monotonic() < deadline
        time.sleep(0.2)
