"""The code location: what the Dagster UI shows, and that its schedule measures what is live."""

from datetime import UTC, datetime

import dagster as dg
import pytest

from rag_assets.definitions import defs

ASSETS = {
    *("source_files", "documents", "chunks", "embeddings", "index_snapshot"),
    *(
        "eval_set",
        "retrieval_evaluation",
        "model_leaderboard",
        "quality_gate",
        "warm_up_gate",
        "canary",
        "production_release",
        "model_registry",
    ),
    *("release_ledger", "rollback_drill"),
    *("champion_evaluation", "embedding_drift", "query_drift", "corpus_drift", "index_health"),
}


@pytest.fixture(scope="module")
def repository():
    return defs().get_repository_def()


def test_the_graph_is_the_one_of_the_design(repository):
    """Every asset is there under its own name, and evaluation stands between the snapshot and the release."""
    graph = repository.asset_graph
    assert {key.to_user_string() for key in graph.get_all_asset_keys()} == ASSETS
    parents = {
        key.to_user_string(): {parent.to_user_string() for parent in graph.get(key).parent_keys} for key in graph.get_all_asset_keys()
    }
    assert parents["retrieval_evaluation"] == {"index_snapshot", "eval_set"}
    gates = ("model_leaderboard", "quality_gate", "warm_up_gate", "canary", "production_release")
    assert [parents[after] for after in gates[1:]] == [{before} for before in gates[:-1]]
    assert parents["source_files"] == set()


def test_checks_block_what_follows(repository):
    """Counts, ids, vector health, index coverage and MRR are blocking checks."""
    specs = {key.name: repository.asset_graph.get_check_spec(key) for key in repository.asset_graph.asset_check_keys}
    wanted = {
        "documents_not_empty",
        "doc_ids_unique",
        "chunk_ids_unique",
        "vectors_healthy",
        "index_covers_rows",
        "judgments_known",
        "mrr_floor",
    }
    assert wanted <= set(specs)
    assert all(specs[name].blocking for name in wanted)


def test_jobs_and_the_weekly_schedules(repository):
    """Every job exists; each week the default models are built and measured, and drift is measured in one run after that."""
    assert {"build_and_evaluate", "promote", "rollback", "weekly_drift"} <= {job.name for job in repository.get_all_jobs()}
    context = dg.build_schedule_context(scheduled_execution_time=datetime(2026, 11, 23, 4, tzinfo=UTC), repository_def=repository)
    build, drift = (repository.get_schedule_def(name) for name in ("weekly_build", "weekly_drift"))
    requests = build.evaluate_tick(context).run_requests
    assert {"all-MiniLM-L6-v2", "wordllama-256"} <= {request.partition_key for request in requests}
    assert len({request.run_key for request in requests}) == len(requests)
    assert [request.run_key for request in drift.evaluate_tick(context).run_requests] == ["2026-W48"]
    assert build.cron_schedule < drift.cron_schedule
