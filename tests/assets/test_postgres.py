"""The databases behind Dagster and MLflow, on the real embedded server."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import sqlalchemy
from pydantic import SecretStr

from rag_assets import cluster
from rag_assets.postgres import Databases, export, postgres, reach
from rag_serving.errors import PlatformError
from rag_serving.settings import Places, Settings

REPOSITORY = Path(__file__).parents[2]
USER = """
import sys
from pathlib import Path
from rag_assets.postgres import postgres
from rag_serving.settings import Places, Settings
with postgres(Settings(root=Path(sys.argv[1]), places=Places(home=Path("state")))) as databases:
    print(databases.dagster_url, databases.mlflow_url, flush=True)
    sys.stdin.readline()
"""


def settings_of(root: Path, **places) -> Settings:
    (root / "dagster_home").mkdir(exist_ok=True)
    (root / "dagster_home/dagster.yaml").touch()
    return Settings(root=root, places=Places(home=Path("state"), **places))


def using_process(root: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", USER, str(root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def leave(process: subprocess.Popen[str]) -> int:
    process.communicate("\n", timeout=60)  # closes both pipes
    return process.returncode


def postmaster(root: Path) -> psutil.Process | None:
    data = str(root / "state/postgres")
    return next((p for p in psutil.process_iter(["cmdline"]) if data in (p.info["cmdline"] or ()) and p.name() == "postgres"), None)


def ask(url: str, statement: str) -> object:
    engine = sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        result = connection.execute(sqlalchemy.text(statement))
        return result.scalar() if result.returns_rows else None


@pytest.fixture(scope="module")
def first_uses(tmp_path_factory) -> tuple[Path, list[tuple[str, int]]]:
    """A root whose databases were first used by two processes at once, with what each printed and its exit code."""
    root = settings_of(tmp_path_factory.mktemp("platform")).root
    processes = [using_process(root), using_process(root)]
    said = [process.stdout.readline().strip() for process in processes]
    return root, [(line, leave(process)) for line, process in zip(said, processes, strict=True)]


@pytest.fixture
def root(first_uses) -> Path:
    return first_uses[0]


def test_two_first_uses_at_once_both_work(first_uses):
    """Two processes that start on an empty home at the same moment get the same databases, and the last to leave stops the server."""
    root, outcomes = first_uses
    urls = f"postgresql+psycopg2://postgres@/dagster?host={root}/state/postgres postgresql+psycopg2://postgres@/mlflow?host={root}/state/postgres"
    assert outcomes == [(urls, 0), (urls, 0)]
    assert postmaster(root) is None


def test_mlflow_tables_are_there(root):
    """MLflow's database is migrated to its current schema before anyone uses it."""
    with postgres(settings_of(root)) as databases:
        assert ask(databases.mlflow_url, "select count(*) from alembic_version") == 1
        assert ask(databases.mlflow_url, "select count(*) from logged_models") == 0


def test_dagster_materializes_into_it(root, tmp_path, monkeypatch):
    """A real Dagster instance with the project's dagster.yaml stores its events in Postgres."""
    import dagster as dg

    shutil.copy(REPOSITORY / "dagster_home/dagster.yaml", tmp_path)

    @dg.asset
    def rows() -> dg.MaterializeResult:
        return dg.MaterializeResult(metadata={"dagster/row_count": 3})

    with postgres(settings_of(root)) as databases:
        for name, value in export(databases).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
        with dg.DagsterInstance.get() as instance:
            assert dg.materialize([rows], instance=instance).success
            event = instance.get_latest_materialization_event(dg.AssetKey("rows"))
            assert event.asset_materialization.metadata["dagster/row_count"].value == 3
            assert type(instance.event_log_storage).__name__ == "PostgresEventLogStorage"
        assert ask(databases.dagster_url, "select count(*) from asset_keys where asset_key = '[\"rows\"]'") == 1


def test_server_stays_for_its_other_user(root):
    """Leaving does not take the server from under another process; that one stops it when it leaves."""
    other = using_process(root)
    other.stdout.readline()
    with postgres(settings_of(root)):
        pass
    assert postmaster(root) is not None
    assert leave(other) == 0
    assert postmaster(root) is None


def test_owner_killed(root):
    """After kill -9 of its owner the server runs on; the next user joins that very server and stops it on leaving."""
    owner = using_process(root)
    owner.stdout.readline()
    left_over = postmaster(root).pid
    owner.kill()
    owner.communicate()
    with postgres(settings_of(root)) as databases:
        assert postmaster(root).pid == left_over
        assert ask(databases.dagster_url, "select 1") == 1
    assert postmaster(root) is None


def test_server_killed_with_committed_rows(root):
    """After kill -9 of the server the next start recovers every committed row."""
    with cluster.server(root / "state/postgres") as url:
        address = url.set(database="dagster").render_as_string()
        ask(address, "create table kept (n int)")
        ask(address, "insert into kept values (7)")
        postmaster(root).send_signal(signal.SIGKILL)
    with postgres(settings_of(root)) as databases:
        assert ask(databases.dagster_url, "select n from kept") == 7
        ask(databases.dagster_url, "drop table kept")


def test_stale_pid_file_of_a_living_process(root):
    """A pid file whose number now belongs to something else does not pass for a running server."""
    data = root / "state/postgres"
    (data / "postmaster.pid").write_text(f"{os.getpid()}\n{data}\n1\n5432\n{data}\n\n0 0\nready\n")
    with postgres(settings_of(root)) as databases:
        assert ask(databases.dagster_url, "select 1") == 1


def test_failed_start_says_why(root):
    """A damaged cluster is a PlatformError with the server's own last words, not a traceback, and waits no minute."""
    configuration = root / "state/postgres/postgresql.conf"
    before = configuration.read_bytes()
    configuration.write_bytes(before + b"\nno_such_parameter = 1\n")
    try:
        with pytest.raises(PlatformError, match="does not start") as refusal, postgres(settings_of(root)):
            pass
    finally:
        configuration.write_bytes(before)
    assert "postgresql.conf" in str(refusal.value)


def test_long_path_and_spaces(tmp_path):
    """A data folder longer than a Unix socket path allows, with a space in it, works; its socket is in a short private folder."""
    data = tmp_path / ("a folder " + "x" * 120) / "postgres"
    with cluster.server(data, durable=False) as url:
        sockets = Path(url.query["host"])
        assert len(str(sockets)) < 100
        assert sockets.stat().st_mode & 0o077 == 0
        assert reach(url.render_as_string())
    shutil.rmtree(sockets)


def test_inherited_url_means_the_same_databases(root):
    """A child that inherits RAGLINE_POSTGRES_URL from the embedded server uses both databases as its parent does."""
    with postgres(settings_of(root)) as databases:
        inherited = SecretStr(export(databases)["RAGLINE_POSTGRES_URL"])
        with postgres(settings_of(root, postgres_url=inherited)) as seen:
            assert seen == databases


def test_given_url_gets_its_driver_and_its_databases(root, monkeypatch):
    """A bare postgresql:// URL gets the psycopg2 driver; its absent database is created; a tracking server given by URL is kept."""
    with cluster.server(root / "state/postgres") as url:
        bare = SecretStr(f"postgresql://postgres@/another?host={url.query['host']}")
        with postgres(settings_of(root, postgres_url=bare, mlflow_url="http://127.0.0.1:9")) as databases:
            assert databases == Databases(
                dagster_url=f"postgresql+psycopg2://postgres@/another?host={url.query['host']}",
                mlflow_url="http://127.0.0.1:9",
                dagster_home=root / "state" / "dagster",
            )
            assert ask(databases.dagster_url, "select current_database()") == "another"


def test_runs_write_to_the_state_folder(root):
    """Dagster's home is below the state folder, with the configuration as it is in the checkout now; the checkout is only read."""
    settings = settings_of(root)
    before = sorted((root / "dagster_home").iterdir())
    for text in ("", "telemetry: {enabled: false}"):
        (root / "dagster_home/dagster.yaml").write_text(text)
        with postgres(settings) as databases:
            home = Path(export(databases)["DAGSTER_HOME"])
        assert home == root / "state" / "dagster"
        assert [(path.name, path.read_text()) for path in home.iterdir()] == [("dagster.yaml", text)]
    assert sorted((root / "dagster_home").iterdir()) == before


def test_forbidden_database_is_explained(root):
    """A user who may not create databases is told which one to create."""
    with cluster.server(root / "state/postgres") as url:
        ask(url.render_as_string(), "drop role if exists modest")
        ask(url.render_as_string(), "create role modest login")
        limited = SecretStr(f"postgresql://modest@/absent?host={url.query['host']}")
        with pytest.raises(PlatformError, match="permission denied") as refusal, postgres(settings_of(root, postgres_url=limited)):
            pass
    assert "createdb absent" in refusal.value.fix


@pytest.mark.parametrize("url", ["postgresql://me:hidden@127.0.0.1:1/dagster", "postgres://me:hidden@no-such-host.invalid/dagster"])
def test_unreachable_server_is_one_line_without_the_password(tmp_path, url):
    """A server that does not answer is a one-line PlatformError with its URL and what to do, and never the password."""
    with pytest.raises(PlatformError, match="does not answer") as refusal, postgres(settings_of(tmp_path, postgres_url=SecretStr(url))):
        pass
    message = str(refusal.value)
    assert "hidden" not in message
    assert "me:***@" in message
    assert "\n" not in message
    assert "RAGLINE_POSTGRES_URL" in refusal.value.fix


@pytest.mark.parametrize("url", ["mysql://localhost/dagster", "nonsense"])
def test_other_urls_are_refused(tmp_path, url):
    """A URL of another database, or none, is refused before anything is connected to."""
    with pytest.raises(PlatformError, match="RAGLINE_POSTGRES_URL"), postgres(settings_of(tmp_path, postgres_url=SecretStr(url))):
        pass


def test_missing_dagster_home_is_explained(tmp_path):
    """Away from the checkout the error names the folder and RAGLINE_CONFIG in one line, and nothing is started or made."""
    with pytest.raises(PlatformError, match=r"no dagster\.yaml in") as refusal, postgres(Settings(root=tmp_path)):
        pass
    assert str(tmp_path / "dagster_home") in refusal.value.what
    assert "RAGLINE_CONFIG" in refusal.value.fix
    assert "\n" not in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc, whose modes nobody can change, root included")
def test_parent_that_cannot_be_opened_is_explained():
    """A folder above the database whose mode cannot be changed is a PlatformError with its name and the variable to set."""
    with pytest.raises(PlatformError, match=r"cannot enter /proc/self/fd, .* cannot be changed: Operation not permitted") as refusal:
        cluster._open_parents(Path("/proc/self/fd/postgres"))
    assert "RAGLINE_HOME" in refusal.value.fix


def test_silent_tracking_server_does_not_stall(tmp_path, monkeypatch):
    """With what is exported, MLflow's client gives up on a server that accepts and never answers within seconds, not minutes."""
    import mlflow

    with socket.create_server(("127.0.0.1", 0)) as silent:
        tracking = f"http://127.0.0.1:{silent.getsockname()[1]}"
        for name in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"):
            monkeypatch.delenv(name, raising=False)
        databases = Databases(dagster_url="", mlflow_url=tracking, dagster_home=tmp_path)
        assert export(databases)["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "5"
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")  # what the environment says stays, and makes this test short
        for name, value in export(databases).items():
            if name.startswith("MLFLOW_HTTP"):
                monkeypatch.setenv(name, value)
        assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "1"
        started = time.monotonic()
        with pytest.raises(mlflow.MlflowException):
            mlflow.MlflowClient(tracking_uri=tracking).search_experiments()
        assert time.monotonic() - started < 10
