"""MLflow as its own server, seen from Dagster: down while a release is made, then up, and links both ways."""

import dagster as dg
import httpx2
import pytest
from generated_corpus import evaluated, settings_for, write_corpus
from mlflow_server import NOISE, free_port, migrated, serving

from rag_assets.workbench import Workbench
from rag_serving import promotion
from rag_serving.releases import Ledger
from rag_serving.settings import ModelSpec

pytestmark = [pytest.mark.timeout(300), *(pytest.mark.filterwarnings(each) for each in NOISE)]
STRONG, WEAK = "all-MiniLM-L6-v2", "wordllama-256"  # names of partitions; hashed models stand behind them here
MODELS = tuple(ModelSpec(name=name, source=f"hashing:{dims}", dims=dims, max_tokens=256) for name, dims in ((STRONG, 256), (WEAK, 64)))


@pytest.fixture
def database(tmp_path):
    (tmp_path / "server").mkdir()
    return migrated(tmp_path / "server")


@pytest.fixture
def port():
    return free_port()


@pytest.fixture
def bench(tmp_path, port, monkeypatch):
    """Two measured models over a small corpus; MLflow is a server at that port, which nobody has started yet."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    write_corpus(tmp_path / "beir", documents=60, queries=50)
    settings = settings_for(tmp_path, models=MODELS)
    places = settings.places.model_copy(update={"mlflow_url": f"http://127.0.0.1:{port}"})
    return Workbench(settings.model_copy(update={"places": places}))


def materialized(bench, asset: str, *, partition: str | None = None):
    """Materialize one asset as Dagster does; its metadata, and the run id."""
    from rag_assets.defs import evaluation, registry

    definition = {"retrieval_evaluation": evaluation.retrieval_evaluation, "model_leaderboard": evaluation.model_leaderboard}.get(
        asset, registry.model_registry
    )
    result = dg.materialize([definition], partition_key=partition, resources={"bench": bench}, selection=[asset], raise_on_error=False)
    (event,) = result.asset_materializations_for_node(asset)
    return {name: value.value for name, value in event.metadata.items()}, result.run_id


def test_mlflow_down_during_a_release_then_up(bench, database, port):
    """A measurement and a promotion go on without MLflow; once it answers it has the runs, named by their Dagster runs, and the alias."""
    evaluated(bench, STRONG)
    for evaluation in (bench.store.root / "evaluations").rglob("*"):
        if evaluation.is_file():
            evaluation.unlink()
    facts, run_id = materialized(bench, "retrieval_evaluation", partition=STRONG)
    assert facts["mlflow_run"] == "not reached; logged at the next run"
    assert {"mrr_at_10", "mrr_at_10_low", "mrr_at_10_high", "ndcg_at_10", "recall_at_10", "latency_p50_ms", "latency_p95_ms"} <= set(facts)
    entry = promotion.promote(
        bench.store, facts["snapshot_id"], gate=bench.settings.gate, actor="tester", reason="for a test", override=True
    )
    assert Ledger(bench.store).state().champion.number == entry.number
    assert "not reached" in materialized(bench, "model_registry")[0]["mlflow"]
    with serving(database, port=port) as url:
        told, _ = materialized(bench, "model_registry")
        assert (told["runs_logged"], told["alias_champion"]) == (1, "retriever-beir-beir version 1")
        weak = evaluated(bench, WEAK)
        facts, _ = materialized(bench, "retrieval_evaluation", partition=WEAK)
        assert facts["champion"] == entry.snapshot_id
        assert facts["mrr_difference_to_champion"] < 0
        assert "| query | expected | got | rank before | rank after |" in facts["worst_regressions"]
        with httpx2.Client(base_url=url, trust_env=False, timeout=20) as web:
            linked = facts["mlflow_run"].rpartition("/")[2]
            run = web.get("/api/2.0/mlflow/runs/get", params={"run_id": linked}).raise_for_status().json()["run"]
            tags = {tag["key"]: tag["value"] for tag in run["data"]["tags"]}
            assert tags["ragline.snapshot_id"] == weak.snapshot_id
            name, version = facts["mlflow_model_version"].rpartition("/models/")[2].split("/versions/")
            found = web.get("/api/2.0/mlflow/model-versions/get", params={"name": name, "version": version}).raise_for_status().json()
            assert found["model_version"]["run_id"] == linked
            champion = web.get("/api/2.0/mlflow/registered-models/alias", params={"name": name, "alias": "champion"}).json()[
                "model_version"
            ]
            released = web.get("/api/2.0/mlflow/runs/get", params={"run_id": champion["run_id"]}).json()["run"]["data"]["tags"]
            tags = {tag["key"]: tag["value"] for tag in released}
            assert tags["dagster.run_id"] == run_id
            assert run_id in tags["dagster.run_url"]
            picture = web.get("/get-artifact", params={"run_id": champion["run_id"], "path": "leaderboard/quality_latency.png"})
            assert picture.content.startswith(b"\x89PNG")
            rows = web.get("/get-artifact", params={"run_id": linked, "path": "queries.json"}).json()
            assert len(rows["data"]) == 50
    board, _ = materialized(bench, "model_leaderboard")
    assert STRONG in board["leaderboard"]
    assert "worse" in board["leaderboard"]
    assert board["quality_against_latency"].startswith("![MRR over latency](data:image/png;base64,iVBOR")
    assert board["models"] == 2
