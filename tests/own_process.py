"""`ragline` commands and other modules as real processes on real sockets, for the time of a `with`."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx2
import psutil

ROOT = Path(__file__).parents[1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(**named: str) -> dict[str, str]:
    """This process' own, with one computing thread and the checkout importable from anywhere."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **named}


@contextmanager
def process(
    module: str, arguments: Sequence[str], *, root: Path, url: str, environ: Mapping[str, str], ready_path: str = "/readyz"
) -> Iterator[psutil.Process]:
    """`python -m module arguments` in `root`, once `ready_path` answers 200; ended by SIGTERM. What it says is in `root`."""
    log = root / f"{module}-{arguments[0].strip('-')}-{url.rpartition(':')[2]}.log"
    with log.open("w") as out:
        started = subprocess.Popen([sys.executable, "-m", module, *arguments], env=dict(environ), cwd=root, stdout=out, stderr=out)
        try:
            deadline = time.monotonic() + 120
            while not _ready(url + ready_path):
                assert started.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
            yield psutil.Process(started.pid)
        finally:
            started.terminate()
            started.wait(30)


def _ready(address: str) -> bool:
    try:
        return httpx2.get(address, trust_env=False).status_code == 200
    except httpx2.TransportError:
        return False
