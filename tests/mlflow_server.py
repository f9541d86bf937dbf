"""A real MLflow: a database made once a session and copied, and a tracking server as a process that a test may stop and start again."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import httpx2

NOISE = [
    "ignore::DeprecationWarning:mlflow",
    "ignore::FutureWarning:mlflow",
    "ignore::DeprecationWarning:pydantic",
    "ignore::ResourceWarning",
]
_ENV = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
}


def migrated(folder: Path) -> Path:
    """An SQLite file with MLflow's tables: three seconds, so it is made once and copied."""
    path = folder / "mlflow.db"
    subprocess.run(
        [sys.executable, "-m", "mlflow", "db", "upgrade", f"sqlite:///{path}"],
        env={**os.environ, **_ENV},
        check=True,
        capture_output=True,
        timeout=100,
    )
    return path


def database(template: Path, folder: Path, monkeypatch) -> str:
    """The URL of a private copy, set as the tracking URI of this process."""
    shutil.copy(template, folder / "mlflow.db")
    url = f"sqlite:///{folder / 'mlflow.db'}"
    for name, value in {**_ENV, "MLFLOW_TRACKING_URI": url}.items():
        monkeypatch.setenv(name, value)
    return url


def free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def serving(database_path: Path, *, port: int) -> Iterator[str]:
    """A tracking server over that database, with its artifacts beside it; gives its URL once it answers, and ends it and its workers."""
    arguments = [
        "server",
        "--backend-store-uri",
        f"sqlite:///{database_path}",
        "--artifacts-destination",
        str(database_path.parent / "kept"),
    ]
    log = database_path.with_suffix(".log")
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", *arguments, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"],
            env={**os.environ, **_ENV},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 90
        while not _answers(url):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _answers(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/health", trust_env=False, timeout=1).is_success
    except httpx2.TransportError:
        return False
