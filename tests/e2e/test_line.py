"""The line from a source to a release, over the real command line, Postgres, Dagster, MLflow and weights."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, environment, facts

SMALL = {"RAGLINE_CORPUS": "sample:small", "RAGLINE_EVAL_SET": "sample:small"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("line")


@pytest.mark.timeout(900)
def test_the_line_promotes_the_better_model_refuses_the_weaker_and_repeats_without_work(ragline, home):
    """`ragline run` ends with the better model live and the weaker refused with its numbers; a second run embeds and builds nothing."""
    first = facts(ragline(home, "run", "--json", **SMALL))
    standings = {row["embedding_model"]: row for row in first["standings"]}
    assert first["promoted"] == 1
    assert standings["all-MiniLM-L6-v2"]["status"] == "champion"
    assert standings["wordllama-256"]["status"] == "refused"
    assert f"{standings['wordllama-256']['metrics']['mrr_at_10']:.3f}" in standings["wordllama-256"]["reason"]

    status = facts(ragline(home, "status", "--json", **SMALL))
    assert status["release"] == 1
    assert status["champion"]["embedding_model"] == "all-MiniLM-L6-v2"
    assert {"mrr_at_10", "mrr_at_10_heldout", "ndcg_at_10", "recall_at_10"} <= set(status["champion"]["metrics"])
    assert status["holds"] == []

    again = facts(ragline(home, "run", "--json", **SMALL))
    assert (again["embedded"], again["snapshots_built"], again["promoted"]) == (0, 0, None)
    assert facts(ragline(home, "status", "--json", **SMALL)) == status

    refused = ragline(home, "promote", "wordllama-256", **SMALL)
    assert refused.returncode == 1
    assert "FAIL" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1

    forced = facts(ragline(home, "promote", "wordllama-256", "--override", "--reason", "to roll it back", "--json", **SMALL))
    assert forced["entry"]["evidence"]["override"] is True
    back = facts(ragline(home, "rollback", "--json", **SMALL))
    print(f"rollback took {back['seconds']} s")
    assert back["seconds"] < 2
    restored = facts(ragline(home, "status", "--json", **SMALL))
    assert restored["release"] == 3
    assert restored["champion"]["snapshot_id"] == status["champion"]["snapshot_id"]

    found = facts(ragline(home, "search", "copy a snapshot to another region", "--json", **SMALL))
    assert found["snapshot_id"] == status["champion"]["snapshot_id"]
    assert any("CopySnapshot" in hit["doc_id"] or "CopyDBSnapshot" in hit["doc_id"] for hit in found["hits"])


@pytest.mark.timeout(900)
def test_a_killed_run_is_finished_by_the_next_one(ragline, tmp_path):
    """kill -9 at several moments of a run loses no committed embedding and leaves the ledger intact; the next run finishes."""
    command = [sys.executable, "-m", "rag_assets", "run", "--models", "wordllama-256", "--json"]
    for seconds in (4, 9, 14, 18):
        child = subprocess.Popen(
            command, cwd=ROOT, env=environment(tmp_path, **SMALL), start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            child.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.kill(child.pid, signal.SIGKILL)
            child.wait()
        time.sleep(0.2)
    committed = sum(1 for _ in (tmp_path / "store" / "embeddings").rglob("*.parquet")) if (tmp_path / "store" / "embeddings").exists() else 0
    final = facts(ragline(tmp_path, "run", "--models", "wordllama-256", "--json", **SMALL))
    print(f"{committed} segments were committed before the last kill; the finishing run embedded {final['embedded']} texts")
    assert [row["embedding_model"] for row in final["standings"]] == ["wordllama-256"]
    assert facts(ragline(tmp_path, "run", "--models", "wordllama-256", "--json", **SMALL))["embedded"] == 0
