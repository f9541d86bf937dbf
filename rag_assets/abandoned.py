"""Runs whose process was killed: ended as failures, so that the pool slots they hold do not keep the next run waiting for ever.

Dagster's daemon watches the runs that it launched itself; a run inside `ragline run` has nobody but the next one. That one judges by process
id, so it judges only where ids mean the same: containers may share a host name, and each has a process 1.
"""

import socket
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import dagster as dg
import psutil

PROCESS_TAG = "ragline/process"
CLOCK_STEP = 5.0  # seconds by which a corrected clock may move the beginning of a process
_UNKNOWN = "-"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a process id counts: a host and its machine id, the boot that it runs since, and the inode of a pid namespace; `-` is unknown.

    The inode is unique among the namespaces of one boot at one time. Containers mostly have no machine id.
    """

    host: str
    machine: str
    boot: str
    namespace: str

    @classmethod
    @cache
    def here(cls) -> "Place":
        try:
            namespace = str(Path("/proc/self/ns/pid").stat().st_ino)
        except OSError:
            namespace = _UNKNOWN
        return cls(socket.gethostname(), _line("/etc/machine-id"), _line("/proc/sys/kernel/random/boot_id"), namespace)

    def __str__(self) -> str:
        return "/".join(asdict(self).values())


def process_tags() -> dict[str, str]:
    """The tags of a run in this process: where it lives (place, process id, when that process began), and that no daemon can repeat it."""
    process = psutil.Process()
    return {PROCESS_TAG: f"{Place.here()}:{process.pid}:{process.create_time():.2f}", "dagster/max_retries": "0"}


def end_abandoned_runs(instance: dg.DagsterInstance) -> list[str]:
    """Fail the unfinished runs of this place whose process is gone, and give back their pool slots; the ids of those runs.

    Gone is what this machine ran before it was started, too. A run without the tag, or of another place, is not ours to judge and stays as it is.
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
    try:
        where, pid, began = tag.rsplit(":", 2)
        place, process_id, at = Place(*where.split("/")), int(pid), float(began)
    except (ValueError, TypeError):
        return False
    here = Place.here()
    if place != here:
        same_machine = (place.host, place.machine) == (here.host, here.machine) and here.machine != _UNKNOWN
        return same_machine and place.boot != here.boot and at < psutil.boot_time() - CLOCK_STEP
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(process_id)
        return bool(process.status() == psutil.STATUS_ZOMBIE) or abs(process.create_time() - at) > CLOCK_STEP
    return True


def _line(path: str) -> str:
    with suppress(OSError):
        return Path(path).read_text(encoding="ascii").strip() or _UNKNOWN
    return _UNKNOWN
