"""`ragline up` on real small processes: what is announced, what is refused, and that nothing is left running."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from pydantic import SecretStr
from rich.console import Console

from rag_assets.platform import environment, services, tracing, up
from rag_assets.postgres import Databases
from rag_serving.edge.ports import port_is_free
from rag_serving.errors import PlatformError
from rag_serving.settings import Places, Settings, load_settings
from rag_serving.signals.exporting import ENDPOINTS

REPOSITORY = Path(__file__).parents[2]
UP = """
import sys
from rich.console import Console
from rag_assets import platform
from rag_serving.settings import load_settings
platform.STOP_SECONDS = 1
sys.exit(platform.up(load_settings(), console=Console()))
"""
ANSWERS = """
import http.server, sys
class Yes(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Yes).serve_forever()
"""
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if "child" not in sys.argv:
    subprocess.Popen([sys.executable, __file__, "child"], start_new_session=True)
print("stubborn starts", flush=True)
time.sleep(600)
"""
PROCFILE = """webserver: exec python answers.py "$RAGLINE_DAGSTER_PORT"
serving: exec python answers.py "$RAGLINE_SERVING_PORT"
stubborn: exec python stubborn.py
"""
PLACES = {
    "RAGLINE_MLFLOW_URL": "http://127.0.0.1:9",
    **{f"RAGLINE_{name}_PORT": "0" for name in ("DAGSTER", "MLFLOW", "EMBEDDER", "SERVING")},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("platform")
    (root / "answers.py").write_text(ANSWERS)
    (root / "stubborn.py").write_text(STUBBORN)
    (root / "dagster_home").mkdir()
    (root / "dagster_home/dagster.yaml").touch()
    return root


def start(root: Path, procfile: str) -> subprocess.Popen[str]:
    (root / "Procfile").write_text(procfile)
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAGLINE_")} | PLACES
    return subprocess.Popen([sys.executable, "-c", UP], cwd=root, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def read_until(process: subprocess.Popen[str], *words: str) -> str:
    said = ""
    for line in process.stdout:
        said += line
        if all(word in said for word in words):
            return said
    process.wait()
    pytest.fail(f"ended without saying {words}: {said}")


def living(root: Path) -> list[list[str]]:
    """Command lines of processes that work in that root or keep its database."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            command = process.cmdline()
            if process.cwd().startswith(str(root)) or any(str(root) in word for word in command):
                found.append(command)
    return found


@pytest.mark.timeout(40)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_stop_leaves_nothing(root, number):
    """Each URL is printed once when it answers; a signal stops all, also a child in its own session that ignores SIGTERM; exit code 0."""
    process = start(root, PROCFILE)
    said = read_until(process, "Everything is up", "serving   http://", "stubborn starts")
    assert said.count("Dagster is up at http://127.0.0.1:") == 1
    assert said.count("serving is up at http://127.0.0.1:") == 1
    assert sum("stubborn.py" in " ".join(command) for command in living(root)) == 2
    process.send_signal(number)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 0, rest
    assert "Everything is stopped." in rest or number == signal.SIGHUP
    assert living(root) == []


def test_one_death_ends_all(root):
    """When one process dies all stop, it is named with its exit code, and that is the exit code."""
    process = start(root, 'serving: exec python answers.py "$RAGLINE_SERVING_PORT"\ndaemon: sleep 1; exit 3\n')
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 3
    assert "daemon ended with exit code 3" in said
    assert living(root) == []


def test_taken_port_is_refused_before_anything_starts(tmp_path):
    """A taken port names the port, who needs it, who holds it and the variable; nothing is started, not even the database."""
    (tmp_path / "Procfile").write_text("serving: touch started")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        settings = Settings(root=tmp_path, places=Places(home=Path("state"), serving_port=port))
        assert not port_is_free("127.0.0.1", port)
        with pytest.raises(
            PlatformError, match=f"port {port} on 127.0.0.1, which serving needs, is taken by .* .process {os.getpid()}"
        ) as refusal:
            up(settings, console=Console())
    assert "RAGLINE_SERVING_PORT" in refusal.value.fix
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Procfile"]
    assert port_is_free("127.0.0.1", port)


def test_missing_procfile_is_explained(tmp_path):
    """Outside a checkout the error says what is missing."""
    with pytest.raises(PlatformError, match="no Procfile"):
        up(Settings(root=tmp_path), console=Console())


def test_children_read_the_same_settings(tmp_path, monkeypatch):
    """What is exported is what load_settings reads back in a child: every RAGLINE_ variable is a known one and the home is absolute."""
    for name in PLACES:
        monkeypatch.delenv(name, raising=False)
    settings = Settings(root=tmp_path, places=Places(home=Path("state"), serving_port=8001))
    databases = Databases(
        dagster_url="postgresql+psycopg2://me:hidden@h/d", mlflow_url="postgresql+psycopg2://me:hidden@h/m", dagster_home=tmp_path
    )
    seen = load_settings(environ=environment(settings, databases)).places
    assert (seen.serving_port, seen.home, seen.host) == (8001, settings.home, "127.0.0.1")
    assert seen.postgres_url == SecretStr(databases.dagster_url)


def test_traces_go_to_mlflow_unless_told_otherwise(tmp_path, monkeypatch):
    """The services are told the platform's MLflow, a named one instead of it, and nothing where the environment names an endpoint itself."""
    for name in ENDPOINTS:
        monkeypatch.delenv(name, raising=False)
    settings = Settings(root=tmp_path, places=Places(mlflow_port=5001))
    assert tracing(settings) == {
        ENDPOINTS[0]: "http://127.0.0.1:5001/v1/traces",
        "OTEL_EXPORTER_OTLP_TRACES_HEADERS": "x-mlflow-experiment-id=0",
    }
    named = Settings(root=tmp_path, places=Places(mlflow_url="http://mlflow.example/"))
    assert tracing(named)[ENDPOINTS[0]] == "http://mlflow.example/v1/traces"
    monkeypatch.setenv(ENDPOINTS[1], "http://collector.example:4318")
    assert tracing(settings) == {}


def test_procfile_shows_no_secret_and_no_stray_name():
    """The Procfile's commands hold no URL (command lines are public on a machine) and only variables that are exported to it."""
    settings = Settings(root=REPOSITORY)
    databases = Databases(dagster_url="postgresql://d", mlflow_url="postgresql://m", dagster_home=REPOSITORY)
    text = (REPOSITORY / "Procfile").read_text()
    assert "_URL" not in text
    assert "_URI" not in text
    used = {word.strip('"$').partition("/")[0] for word in text.split() if word.startswith('"$')}
    assert used <= environment(settings, databases).keys()
    assert {service.process for service in services(settings)} < {line.partition(":")[0] for line in text.splitlines()}


def test_interrupt_before_the_processes_start(root):
    """A signal while the database is still starting also ends cleanly."""
    process = start(root, PROCFILE)
    while process.poll() is None and not any("postgres" in " ".join(command) for command in living(root)):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert living(root) == []
