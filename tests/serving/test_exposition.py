"""Metrics: what is declared is what is collected, labels never take what a user wrote, and levels are those of the process that is asked."""

import re

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from small_service import build, embedding, release, serving, settings_for

from rag_serving.signals import contract, metrics
from rag_serving.signals.contract import METRICS, Category, Label, Metric
from rag_serving.signals.metrics import Level
from rag_serving.store import LocalStore

MOST_SERIES = 1500


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    """A client of a service with one release and a running embedding service."""
    root = tmp_path_factory.mktemp("metrics")
    store, settings = LocalStore(root / "store"), settings_for(root)
    release(store, build(store, settings))
    with embedding(settings) as url, serving(settings_for(root, embedder_url=url), store) as client:
        yield client


def value(series, name: str, **labels: str) -> float:
    return series.get((name, tuple(sorted(labels.items()))), 0.0)


def test_names_follow_the_conventions():
    """A counter ends in _total, a duration in _seconds, names are unique, and every metric says what it is and belongs to a category."""
    names = [metric.name for metric in METRICS]
    assert len(names) == len(set(names))
    for metric in METRICS:
        assert re.fullmatch(r"(rag|gen_ai)_[a-z0-9_]+", metric.name)
        assert metric.name.endswith("_total") is (metric.kind == "counter")
        assert metric.name.endswith("_seconds") is (metric.unit == "seconds")
        assert list(metric.buckets) == sorted(set(metric.buckets))
        assert bool(metric.buckets) is (metric.kind == "histogram")
        assert metric.says
    assert {metric.category for metric in METRICS} == set(Category)


def test_no_traffic_can_make_more_series_than_the_budget():
    """Every combination of every label value together stays below 1,500 series, because labels have closed lists of values."""
    assert all(sum(metric.most_series for metric in METRICS if metric.where == where) <= MOST_SERIES for where in ("serving", "embedder"))


def test_a_label_never_takes_a_foreign_value():
    """A value that is not declared is counted as `other`."""
    before = metrics.samples()
    metrics.count(contract.GUARD_EVENTS, "input", "' OR 1=1 --", "flag")
    after = metrics.samples()
    added = {key: after[key] - before.get(key, 0.0) for key in after if after[key] != before.get(key, 0.0)}
    assert added == {("rag_guard_events_total", (("action", "flag"), ("guard", "input"), ("rule", "other"))): 1.0}


def test_what_is_read_is_absent_until_it_is_known():
    """A gauge without a value is not shown as 0: an alert on its absence can fire."""
    assert "rag_eval_mrr " not in metrics.exposition([])[0].decode()
    assert "rag_eval_mrr 0.812\n" in metrics.exposition([Level(contract.EVAL_MRR, 0.812)])[0].decode()


def test_levels_of_labels_and_counters_that_are_read():
    """A read counter and a labelled gauge are exposed with their types and label names."""
    text = metrics.exposition([Level(contract.CACHED, 3, ("hit",)), Level(contract.DRIFT_P, 0.5, ("query",))])[0].decode()
    assert "# TYPE rag_embedding_cache_total counter" in text
    assert 'rag_embedding_cache_total{result="hit"} 3.0' in text
    assert 'rag_drift_pvalue{test="query"} 0.5' in text


def test_a_wrong_number_of_labels_is_an_error():
    """Labels are given in full, in the order of the declaration."""
    with pytest.raises(ValueError, match="zip"):
        metrics.count(contract.REQUESTS, "/v1/query")


def test_series_counts_are_of_the_declaration():
    """The bound of a metric counts each label value, `other`, each bucket, +Inf, sum and count."""
    metric = Metric("rag_x", "histogram", "1", Category.QUERY, "x", (Label("a", ("b", "c")),), (1.0, 2.0))
    assert metric.most_series == 3 * 5


def test_a_request_moves_its_metrics(client):
    """A question is counted once by route and outcome, its phases are timed, and what it found is observed."""
    before = metrics.samples()
    assert client.post("/v1/query", json={"query": "How do I delete a bucket?", "top_k": 3}).status_code == 200
    after = metrics.samples()

    def moved(name: str, **labels: str) -> float:
        return value(after, name, **labels) - value(before, name, **labels)

    assert moved("rag_requests_total", route="/v1/query", outcome="ok") == 1
    assert moved("rag_request_duration_seconds_count", route="/v1/query", outcome="ok") == 1
    assert moved("rag_retrieved_chunks_sum") == 3
    assert moved("rag_query_tokens_count") == 1
    assert moved("rag_context_tokens_count") == 1
    for phase in ("admit", "encode", "retrieve", "assemble", "generate"):
        assert moved("rag_phase_duration_seconds_count", phase=phase) == 1, phase


def test_addresses_and_words_of_users_are_in_no_series(client):
    """Whatever is asked, at whatever address and by whatever agent, none of it becomes a label."""
    for _ in range(3):
        client.get("/secret-address", headers={"User-Agent": "secret-agent"})
        client.post("/v1/query", json={"query": "secret-word"}, headers={"X-Request-Id": "secret-id"})
        client.post("/v1/query", json={"query": "x", "secret-field": 1})
    text = client.get("/metrics").text
    assert "secret" not in text
    assert len([line for line in text.splitlines() if line.startswith(("rag_", "gen_ai_"))]) <= MOST_SERIES


def test_everything_collected_is_declared(client):
    """/metrics shows declared metrics alone, with their types."""
    declared = {metric.name.removesuffix("_total"): metric.kind for metric in METRICS}
    reply = client.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    families = list(text_string_to_metric_families(reply.text))
    assert {family.name: family.type for family in families if declared.get(family.name) != family.type} == {}
    assert {"rag_requests", "rag_index_generation", "rag_breaker_state", "rag_slots"} <= {family.name for family in families}


def test_levels_are_of_the_open_release(client):
    """Generation, rows and holds are those of what is open and of the ledger; what was never measured is absent."""
    text = client.get("/metrics").text
    assert "rag_index_generation 1.0" in text
    assert "rag_ledger_generation 1.0" in text
    assert "rag_index_rows 5.0" in text
    assert "rag_holds 0.0" in text
    assert 'rag_breaker_state{dependency="embedder"} 0.0' in text
    assert "\nrag_eval_mrr" not in text
    assert "\nrag_previous_snapshot_open" not in text


def test_an_exemplar_leads_to_a_trace(client):
    """A bucket of the request duration names the trace of a request in it, the one its reply named."""
    reply = client.post("/v1/retrieve", json={"query": "stop"}, headers={"traceparent": f"00-{'ef' * 16}-{'cd' * 8}-01"})
    assert reply.json()["trace_id"] == "ef" * 16
    text = client.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"}).text
    buckets = [line for line in text.splitlines() if line.startswith("rag_request_duration_seconds_bucket") and "ef" * 16 in line]
    assert len(buckets) == 1
    assert 'route="/v1/retrieve"' in buckets[0]


def test_metrics_are_fresh_and_no_part_of_the_api(client):
    """/metrics is not cached, and is no page of the API's description."""
    assert client.get("/metrics").headers["Cache-Control"] == "no-store"
    assert "/metrics" not in client.get("/openapi.json").json()["paths"]
