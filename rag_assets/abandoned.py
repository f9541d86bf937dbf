"""Runs whose process was killed: ended as failures, so that the pool slots they hold do not keep the next run waiting for ever.

Dagster's daemon watches the runs that it launched itself; a run inside `ragline run` has nobody but the next one.
"""

import socket
from contextlib import suppress

import dagster as dg
import psutil

PROCESS_TAG = "ragline/process"
CLOCK_STEP = 5.0  # seconds by which a corrected clock may move the beginning of a process


def process_tags() -> dict[str, str]:
    """The tags of a run in this process: where it lives (host, process id, when that process began), and that no daemon can repeat it."""
    process = psutil.Process()
    return {PROCESS_TAG: f"{socket.gethostname()}:{process.pid}:{process.create_time():.2f}", "dagster/max_retries": "0"}


def end_abandoned_runs(instance: dg.DagsterInstance) -> list[str]:
    """Fail the unfinished runs of this host whose process is gone, and give back their pool slots; the ids of those runs.

    A run without the tag, or of another host, is not ours to judge and stays as it is.
    """
    ended = []
    unfinished = dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.CANCELING])
    for run in instance.get_runs(unfinished):
        if _is_gone(run.tags.get(PROCESS_TAG, "")):
            instance.report_run_failed(run, "Its process was ended from outside.")
            instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
            ended.append(run.run_id)
    return ended


def _is_gone(tag: str) -> bool:
    host, _, rest = tag.partition(":")
    pid, _, began = rest.partition(":")
    if host != socket.gethostname() or not pid.isdigit():
        return False
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(int(pid))
        return bool(process.status() == psutil.STATUS_ZOMBIE) or abs(process.create_time() - float(began)) > CLOCK_STEP
    return True
