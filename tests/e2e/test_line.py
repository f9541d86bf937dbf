"""The line from a source to a release, over the real command line, Postgres, Dagster, MLflow and weights."""

import os
import signal
import subprocess
import time

import pytest
from conftest import ROOT, SMALL, command, environment, facts

pytestmark = pytest.mark.timeout(900)


def test_the_better_model_is_promoted_and_the_weaker_refused_with_its_numbers(ragline, first_run):
    """A run ends with the better model live, the weaker refused, and the reason names its MRR."""
    home, result = first_run
    standings = {row["embedding_model"]: row for row in result["standings"]}
    assert result["promoted"] == 1
    assert result["embedded"] > 2000
    assert standings["all-MiniLM-L6-v2"]["status"] == "champion"
    assert standings["wordllama-256"]["status"] == "refused"
    assert f"{standings['wordllama-256']['metrics']['mrr_at_10']:.3f}" in standings["wordllama-256"]["reason"]
    status = facts(ragline(home, "status", "--json"))
    assert status["release"] == 1
    assert status["champion"]["embedding_model"] == "all-MiniLM-L6-v2"
    assert status["champion"]["metrics"]["mrr_at_10"] >= 0.80
    assert {"mrr_at_10", "mrr_at_10_heldout", "mrr_at_10_tune", "ndcg_at_10", "recall_at_10"} <= set(status["champion"]["metrics"])
    assert status["holds"] == []


def test_a_second_run_changes_nothing(ragline, first_run):
    """Run again: 0 texts embedded, 0 snapshots built, no ledger entry, and the status is the same to the byte."""
    home, _ = first_run
    before = ragline(home, "status", "--json").stdout
    again = facts(ragline(home, "run", "--json", **SMALL))
    assert (again["embedded"], again["snapshots_built"], again["promoted"]) == (0, 0, None)
    assert ragline(home, "status", "--json").stdout == before


def test_promotion_is_refused_with_the_verdict_and_an_override_rolls_back_in_seconds(ragline, released):
    """A failed verdict refuses a promotion in one line; an override is recorded; rollback restores the champion in under 2 s."""
    champion = facts(ragline(released, "status", "--json"))["champion"]["snapshot_id"]
    refused = ragline(released, "promote", "wordllama-256")
    assert refused.returncode == 1
    assert "FAIL" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
    forced = facts(ragline(released, "promote", "wordllama-256", "--override", "--reason", "to roll it back", "--json"))
    assert forced["entry"]["evidence"]["override"] is True
    back = facts(ragline(released, "rollback", "--json"))
    print(f"rollback took {back['seconds']} s")
    assert back["seconds"] < 2
    restored = facts(ragline(released, "status", "--json"))
    assert (restored["release"], restored["champion"]["snapshot_id"]) == (3, champion)


def test_search_answers_from_the_released_snapshot(ragline, released):
    """`ragline search` finds the operation that a plain question asks for, and names the snapshot."""
    found = facts(ragline(released, "search", "copy a snapshot to another region", "--json"))
    assert found["snapshot_id"] == facts(ragline(released, "status", "--json"))["champion"]["snapshot_id"]
    assert any("Snapshot" in hit["doc_id"] and "Copy" in hit["doc_id"] for hit in found["hits"])


def test_a_killed_run_is_finished_by_the_next_one(ragline, tmp_path):
    """Kill -9 at several moments of a run: the next run finishes, embeds nothing that was committed, and the ledger is intact."""
    arguments = ("run", "--models", "wordllama-256", "--json")
    segments = tmp_path / "store" / "embeddings"
    for seconds in (5, 12, 20):
        child = subprocess.Popen(
            command(*arguments),
            cwd=ROOT,
            env=environment(tmp_path, **SMALL),
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            child.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.kill(child.pid, signal.SIGKILL)
            child.wait()
        time.sleep(0.2)
    committed = {path: path.stat().st_mtime_ns for path in segments.rglob("*.parquet")}
    final = facts(ragline(tmp_path, *arguments, **SMALL))
    print(f"{len(committed)} segments were committed before the last kill; the finishing run embedded {final['embedded']} texts")
    assert [row["embedding_model"] for row in final["standings"]] == ["wordllama-256"]
    assert {path: path.stat().st_mtime_ns for path in committed} == committed
    assert facts(ragline(tmp_path, *arguments, **SMALL))["embedded"] == 0
    entries = facts(ragline(tmp_path, "releases", "--json"))["entries"]
    assert [(entry["number"], entry["action"]) for entry in entries] == [(1, "promote")]
