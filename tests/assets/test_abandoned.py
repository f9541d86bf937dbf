"""Runs whose process was killed do not keep the next run waiting."""

import os
import signal
import subprocess
import sys
import time

import dagster as dg
import pytest

from rag_assets.abandoned import end_abandoned_runs, process_tags

ONE_SLOT = """
concurrency:
  pools:
    default_limit: 1
telemetry:
  enabled: false
"""
CHILD = """
import sys, time
from pathlib import Path
import dagster as dg
from rag_assets.abandoned import process_tags

@dg.op(pool="embedder")
def wait():
    Path(sys.argv[1]).touch()
    time.sleep(float(sys.argv[2]))

@dg.job
def one():
    wait()

with dg.DagsterInstance.get() as instance:
    one.execute_in_process(instance=instance, tags=process_tags())
"""


@pytest.fixture
def home(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "dagster.yaml").write_text(ONE_SLOT)
    return tmp_path / "home"


def run_in_a_child(home, entered, *, seconds: float) -> subprocess.Popen:
    """A process whose run holds the only slot of the pool, or waits for it."""
    env = {**os.environ, "DAGSTER_HOME": str(home)}
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen([sys.executable, "-c", CHILD, str(entered), str(seconds)], env=env, **silent)


def wait_for(path) -> None:
    while not path.exists():
        time.sleep(0.05)


def test_a_killed_run_is_failed_and_gives_its_slot_back(home, tmp_path):
    """After kill -9 of a run that holds the pool's only slot, the run is marked failed and another run gets the slot."""
    first = run_in_a_child(home, tmp_path / "first", seconds=600)
    wait_for(tmp_path / "first")
    with dg.DagsterInstance.from_config(str(home)) as instance:
        assert end_abandoned_runs(instance) == []
        first.send_signal(signal.SIGKILL)
        first.wait()
        (ended,) = end_abandoned_runs(instance)
        assert instance.get_run_by_id(ended).status is dg.DagsterRunStatus.FAILURE
        assert end_abandoned_runs(instance) == []
    assert run_in_a_child(home, tmp_path / "second", seconds=0).wait() == 0
    assert (tmp_path / "second").exists()


@pytest.mark.parametrize("tags", [{}, {"ragline/process": "elsewhere:1:1.0"}, {"ragline/process": "damaged"}, process_tags()])
def test_runs_of_others_are_left_alone(tags):
    """A run without the tag, of another host, with a tag that says nothing, or of a living process stays as it is."""
    with dg.DagsterInstance.ephemeral() as instance:
        run = dg.DagsterRun("one", tags=tags, status=dg.DagsterRunStatus.STARTED)
        instance.add_run(run)
        assert end_abandoned_runs(instance) == []
        assert instance.get_run_by_id(run.run_id).status is dg.DagsterRunStatus.STARTED
