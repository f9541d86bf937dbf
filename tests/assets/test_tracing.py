"""Traces of Dagster runs: one tree a run however many processes it takes, failures without their words, and sinks that answer nothing."""

import time

import dagster as dg
import pytest
import traced_job
from opentelemetry.trace import StatusCode
from trace_sink import sink
from traced_line import kept_spans, metadata_of, trace_of

from rag_assets import tracing
from rag_assets.definitions import defs
from rag_serving.signals import contract

RUN_ID = "8c5a1f6e-3c0e-4a57-9f52-1df2e0a0b7c4"
ENDPOINT = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"


@pytest.fixture
def instance():
    with dg.DagsterInstance.ephemeral() as made:
        yield made


@pytest.fixture
def fresh(monkeypatch):
    """This process has not recorded anything yet."""
    monkeypatch.setattr(tracing, "_recorder", None)
    monkeypatch.delenv("OTEL_TRACES_EXPORTER", raising=False)


def test_every_function_of_the_code_location_is_traced():
    """No asset, check or op is defined with a decorator of Dagster's own, and no job runs on an executor of its own."""
    repository = defs().get_repository_def()
    jobs = repository.get_all_jobs()
    nodes = {node.name: node for job in jobs for node in job.all_node_defs if isinstance(node, dg.OpDefinition)}
    assert len(nodes) > 20
    untraced = [name for name, node in nodes.items() if not hasattr(node.compute_fn.decorated_fn, "__wrapped__")]
    assert untraced == []
    assert {job.executor_def.name for job in jobs} <= {"traced_in_process", "traced_multi_or_in_process_executor"}


def test_ids_follow_from_the_run_id():
    """The trace id is the run id without dashes; a run id of another form has one too, always the same."""
    assert tracing.trace_id_of_run(RUN_ID) == RUN_ID.replace("-", "")
    assert tracing.trace_id_of_run("nightly") == tracing.trace_id_of_run("nightly") != tracing.trace_id_of_run("nightly-2")
    assert len(tracing.trace_id_of_run("nightly")) == 32


def test_a_run_is_a_tree_and_a_failure_leaves_no_words(instance):
    """Run, steps and what they did are one tree; the failed step has the code of its error and nothing of its message, which held a secret."""
    with kept_spans() as kept:
        done = tracing.execute(traced_job.pair_and_failure, instance=instance, raise_on_error=False)
        spans = trace_of(kept.get_finished_spans(), done.run_id)
    assert not done.success
    names = {span.name: span for span in spans}
    assert set(names) == {"run pair_and_failure", "step first", "step second", "step fails", "verify"}
    assert names["verify"].parent.span_id == names["step second"].context.span_id
    assert names["step fails"].attributes[contract.ERROR_TYPE.name] == "snapshot"
    assert {name for name, span in names.items() if span.status.status_code is StatusCode.ERROR} == {"run pair_and_failure", "step fails"}
    assert traced_job.SECRET not in " ".join(span.to_json() for span in spans)
    assert metadata_of(done)["first"] == {"trace_id": done.run_id.replace("-", "")}


def test_outside_a_recorded_run_a_step_is_no_orphan(instance):
    """Where nobody records the run, as in a script that calls materialize, each step is a first span of the run's trace."""
    with kept_spans() as kept:
        done = dg.materialize([traced_job.first, traced_job.second], instance=instance)
        spans = kept.get_finished_spans()
    assert [span.name for span in spans if span.parent is None] == ["step first", "step second"]
    assert {format(span.context.trace_id, "032x") for span in spans} == {done.run_id.replace("-", "")}
    assert metadata_of(done)["second"]["trace_id"] == done.run_id.replace("-", "")


def test_a_killed_run_gets_its_span_from_the_next():
    """The steps of a run whose process is gone are below a span of the run that says so, from its beginning on."""
    with kept_spans() as kept:
        with tracing.step(RUN_ID, "documents", joins=True):
            pass
        tracing.lost(RUN_ID, job="build", partition=None, started=1_700_000_000.5)
        spans = {span.name: span for span in trace_of(kept.get_finished_spans(), RUN_ID)}
    assert set(spans) == {"run build", "step documents"}
    assert (spans["run build"].start_time, spans["run build"].status.status_code) == (1_700_000_000_500_000_000, StatusCode.ERROR)
    assert spans["run build"].attributes[contract.ERROR_TYPE.name] == "killed"


def test_a_result_keeps_all_it_said(instance):
    """Metadata, data version, tags, value and check results of an asset are as it returned them, beside the trace id."""
    done = dg.materialize([traced_job.telling], instance=instance)
    (event,) = [each for each in done.all_events if each.is_step_materialization]
    told = event.step_materialization_data.materialization
    assert told.metadata["rows"].value == 3
    assert told.metadata["trace_id"].value == done.run_id.replace("-", "")
    assert (told.tags["dagster/data_version"], told.tags["made"]) == ("v1", "here")
    assert done.output_for_node("telling", "result") == 7
    assert [check.passed for check in done.get_asset_check_evaluations()] == [True]


def test_spans_reach_an_otlp_endpoint(instance, fresh, monkeypatch):
    """With the standard variable set, the spans of a run have arrived when the run has ended, under the pipeline's own service name."""
    with sink() as kept:
        monkeypatch.setenv(ENDPOINT, kept.url)
        done = tracing.execute(traced_job.pair_and_failure, instance=instance, raise_on_error=False)
        assert {span.name for span in kept.spans} == {"run pair_and_failure", "step first", "step second", "step fails", "verify"}
        assert {span.trace_id.hex() for span in kept.spans} == {done.run_id.replace("-", "")}
    assert kept.services == {tracing.SERVICE}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_steps_in_processes_of_their_own_join_one_tree(fresh, monkeypatch, tmp_path):
    """On the multiprocess executor each step's process sends its own spans; together they are one trace with one root and no orphan."""
    with sink() as kept, dg.instance_for_test(temp_dir=str(tmp_path)) as instance:
        monkeypatch.setenv(ENDPOINT, kept.url)
        with dg.execute_job(dg.reconstructable(traced_job.pair), instance=instance) as done:
            assert done.success
            run_id = done.run_id
        spans = {span.name: span for span in kept.spans}
        assert set(spans) == {"run pair", "step first", "step second", "verify"}
        assert {span.trace_id.hex() for span in kept.spans} == {run_id.replace("-", "")}
        root = spans["run pair"]
        assert root.parent_span_id == b""
        assert {spans[name].parent_span_id for name in ("step first", "step second")} == {root.span_id}
        materialized = instance.get_latest_materialization_event(dg.AssetKey("second")).asset_materialization
        assert materialized.metadata["trace_id"].value == run_id.replace("-", "")


@pytest.mark.heavy
def test_a_sink_that_hangs_costs_a_run_two_seconds(fresh, monkeypatch, tmp_path):
    """With an endpoint that takes connections and never answers, runs end at most 2 s later than without one, in one process or in several."""
    took = {}
    with sink() as kept, dg.instance_for_test(temp_dir=str(tmp_path)) as instance:
        for told in ("none", "hangs"):
            if told == "hangs":
                kept.open.clear()
                monkeypatch.setenv(ENDPOINT, kept.url)
            monkeypatch.setattr(tracing, "_recorder", None)
            started = time.perf_counter()
            tracing.execute(traced_job.pair_and_failure, instance=instance, raise_on_error=False)
            took["one process", told] = time.perf_counter() - started
            started = time.perf_counter()
            with dg.execute_job(dg.reconstructable(traced_job.pair), instance=instance) as done:
                assert done.success
            took["several", told] = time.perf_counter() - started
    for where in ("one process", "several"):
        print(f"{where}: {took[where, 'none']:.2f} s without a sink, {took[where, 'hangs']:.2f} s with one that hangs")
        assert took[where, "hangs"] - took[where, "none"] <= 2
