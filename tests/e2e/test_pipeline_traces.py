"""The trace of a Dagster run where it is read: in a real MLflow, beside the MLflow run of the evaluation that it measured."""

import httpx2
import mlflow_server
import pytest
import traced_line
from traced_line import GX, STRONG, metadata_of

from rag_assets import tracing
from rag_assets.platform import TRACES_EXPERIMENT
from rag_assets.platform import tracing as told
from rag_serving.signals import contract

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(600), pytest.mark.filterwarnings(GX)]


@pytest.mark.filterwarnings(*mlflow_server.NOISE)
def test_a_run_is_read_back_from_mlflow(tmp_path, monkeypatch):
    """What `make up` tells the processes of runs makes MLflow show one trace a run, whole, and tag the evaluation's run with its id."""
    for name in ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tracing, "_recorder", None)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with (
        mlflow_server.serving(mlflow_server.migrated(tmp_path), port=mlflow_server.free_port()) as url,
        traced_line.line(tmp_path, {}) as line,
    ):
        places = line.bench.settings.places.model_copy(update={"mlflow_url": url})
        line.bench.settings = line.bench.settings.model_copy(update={"places": places})
        for name, value in told(line.bench.settings).items():
            monkeypatch.setenv(name, value)
        done = line.run("build_and_evaluate", partition_key=STRONG)
        assert done.success
        trace = done.run_id.replace("-", "")
        with httpx2.Client(base_url=url, trust_env=False, timeout=30) as client:
            body = {"locations": [{"type": "MLFLOW_EXPERIMENT", "mlflow_experiment": {"experiment_id": TRACES_EXPERIMENT}}]}
            found = client.post("/api/3.0/mlflow/traces/search", json=body).json()["traces"]
            assert [each["trace_id"] for each in found] == [f"tr-{trace}"]
            whole = client.get("/api/3.0/mlflow/traces/get", params={"trace_id": f"tr-{trace}"}).json()["trace"]
            experiments = client.post("/api/2.0/mlflow/experiments/search", json={"max_results": 10}).json()["experiments"]
            ids = [each["experiment_id"] for each in experiments]
            runs = client.post("/api/2.0/mlflow/runs/search", json={"experiment_ids": ids}).json()["runs"]
    spans = {span["name"]: span for span in whole["spans"]}
    print(f"{len(whole['spans'])} spans of a run were read back from MLflow; the trace is {found[0]['state']}")
    steps = {name for name in spans if name.startswith("step ")}
    assert {"run build_and_evaluate", "list", "parse", "cut", "embed", "index", "measure", "verify"} <= set(spans)
    assert {f"step {name}" for name in metadata_of(done)} <= steps
    known = {span["span_id"] for span in whole["spans"]}
    orphans = [span["name"] for span in whole["spans"] if span.get("parent_span_id") and span["parent_span_id"] not in known]
    assert orphans == []
    assert [span["name"] for span in whole["spans"] if not span.get("parent_span_id")] == ["run build_and_evaluate"]
    assert contract.SNAPSHOT_ID.name in {each["key"] for each in spans["step index_snapshot"]["attributes"]}
    (run,) = runs
    tags = {tag["key"]: tag["value"] for tag in run["data"]["tags"]}
    assert (tags["dagster.run_id"], tags["ragline.trace_id"]) == (done.run_id, trace)
    assert {facts["trace_id"] for facts in metadata_of(done).values()} == {trace}
