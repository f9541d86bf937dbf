"""Runs whose process was killed do not keep the next run waiting."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import dagster as dg
import psutil
import pytest

from rag_assets.abandoned import PROCESS_TAG, Place, end_abandoned_runs, process_tags

NAMESPACE = ("unshare", "--user", "--pid", "--fork", "--kill-child", "--mount-proc")

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


def run_in_a_child(home, entered, *, seconds: float, within: tuple[str, ...] = ()) -> subprocess.Popen:
    """A process whose run holds the only slot of the pool, or waits for it."""
    env = {**os.environ, "DAGSTER_HOME": str(home)}
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen([*within, sys.executable, "-c", CHILD, str(entered), str(seconds)], env=env, **silent)


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


HERE = Place.here()
BEFORE_BOOT = f"1:{psutil.boot_time() - 3600:.2f}"


def tag(place: Place, process: str = "1:1.00") -> dict[str, str]:
    return {PROCESS_TAG: f"{place}:{process}"}


def ended(tags: dict[str, str]) -> bool:
    """Whether an unfinished run with these tags is ended."""
    with dg.DagsterInstance.ephemeral() as instance:
        run = dg.DagsterRun("one", tags=tags, status=dg.DagsterRunStatus.STARTED)
        instance.add_run(run)
        found = end_abandoned_runs(instance)
        failed = instance.get_run_by_id(run.run_id).status is dg.DagsterRunStatus.FAILURE
    assert failed is (found == [run.run_id])
    return failed


@pytest.mark.parametrize(
    "tags",
    [
        {},
        {PROCESS_TAG: "damaged"},
        {PROCESS_TAG: "host:1:1.0"},
        {PROCESS_TAG: f"{HERE}:1:soon"},
        process_tags(),
        tag(replace(HERE, host="elsewhere")),
        tag(replace(HERE, namespace="4026539999")),
        tag(replace(HERE, machine="f" * 32, boot="another"), BEFORE_BOOT),
        tag(replace(HERE, machine="-", boot="another"), BEFORE_BOOT),
    ],
)
def test_runs_of_others_are_left_alone(tags):
    """What lives, what is of another host or container, or of a boot of what need not be this machine, and what says nothing, stays as it is."""
    assert not ended(tags)


def test_a_run_from_before_the_boot_is_ended(monkeypatch):
    """What this machine ran before it was started again is ended, though its process ids mean nothing now; what began since is not."""
    here = replace(HERE, machine="0" * 32)
    monkeypatch.setattr(Place, "here", lambda: here)
    assert ended(tag(replace(here, boot="another", namespace="1"), BEFORE_BOOT))
    assert not ended(tag(replace(here, boot="another"), f"1:{time.time():.2f}"))


def test_two_containers_of_one_host_name(home, tmp_path):
    """A run in another pid namespace, whose process id is free here, lives on while runs here are looked at; the tag names both namespaces."""
    if subprocess.run([*NAMESPACE, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this machine makes no pid namespaces")
    first = run_in_a_child(home, tmp_path / "first", seconds=600, within=NAMESPACE)
    try:
        wait_for(tmp_path / "first")
        with dg.DagsterInstance.from_config(str(home)) as instance:
            assert end_abandoned_runs(instance) == []
            (run,) = instance.get_runs()
            assert run.status is dg.DagsterRunStatus.STARTED
            where, _, _ = run.tags[PROCESS_TAG].rsplit(":", 2)
            assert where != str(HERE)
            assert where.rpartition("/")[0] == str(HERE).rpartition("/")[0]
    finally:
        first.kill()
        first.wait()
