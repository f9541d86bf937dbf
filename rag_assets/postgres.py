"""PostgreSQL for Dagster and MLflow: the server that RAGLINE_POSTGRES_URL names, or one from a wheel on this machine (cluster.py)."""

import logging
import os
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import URL, Connection, Engine, NullPool, create_engine, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError, SQLAlchemyError

from rag_assets.cluster import DRIVER, server
from rag_serving.errors import PlatformError
from rag_serving.settings import CONFIG_NAME, Settings

MLFLOW_LOCK = 0x7261676C  # advisory lock: one process at a time creates MLflow's tables
# MLflow's own defaults retry an unreachable tracking server for minutes
MLFLOW_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "5"}


@dataclass(frozen=True)
class Databases:
    """Where Dagster and MLflow keep what they record: in databases, and what Dagster's runs leave in files below `dagster_home`.

    URLs are SQLAlchemy's, with the password; `mlflow_url` may be a tracking server.
    """

    dagster_url: str
    mlflow_url: str
    dagster_home: Path


def export(databases: Databases) -> dict[str, str]:
    """The environment in which Dagster, MLflow and every `ragline` process below this one find the same databases.

    How patient MLflow's client is stays as the environment already says, where it does.
    """
    return {
        **{name: os.environ.get(name, value) for name, value in MLFLOW_PATIENCE.items()},
        "RAGLINE_POSTGRES_URL": databases.dagster_url,
        "MLFLOW_TRACKING_URI": databases.mlflow_url,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "DAGSTER_HOME": str(databases.dagster_home),
        "DAGSTER_DISABLE_TELEMETRY": "yes",
        "GX_ANALYTICS_ENABLED": "false",
        "HF_HUB_OFFLINE": "1",
    }


@contextmanager
def postgres(settings: Settings) -> Iterator[Databases]:
    """Both databases, ready for use; the embedded server runs at least as long as the block.

    Raises PlatformError when Dagster's configuration is not beside ragline.toml, or the server does not start, does not answer or refuses
    a database.
    """
    given = settings.root / "dagster_home" / "dagster.yaml"
    if not given.is_file():
        raise PlatformError(
            f"no dagster.yaml in {given.parent}.", fix=f"Run ragline in its checkout, or set RAGLINE_CONFIG to the {CONFIG_NAME} there."
        )
    if settings.places.postgres_url is not None:
        yield _databases(settings, _given(settings.places.postgres_url.get_secret_value()))
        return
    with server(settings.home / "postgres") as url:
        yield _databases(settings, url.set(database="dagster"), mlflow="mlflow")


def reach(url: str) -> str:
    """The server's version string; PlatformError when it does not answer. Creates nothing."""
    target = _given(url)
    with _connection(target, _maintenance(target)) as connection:
        return str(connection.scalar(text("show server_version")))


def _given(url: str) -> URL:
    try:
        parsed = make_url(url.replace("postgres://", "postgresql://", 1))
    except ArgumentError:
        raise PlatformError("RAGLINE_POSTGRES_URL is not a URL.", fix="Write postgresql://user:password@host:5432/dagster.") from None
    if parsed.get_backend_name() != "postgresql":
        raise PlatformError(
            f"RAGLINE_POSTGRES_URL names {parsed.get_backend_name()}, not Postgres.", fix="Write postgresql://user:password@host/dagster."
        )
    return parsed.set(drivername=DRIVER, database=parsed.database or "dagster")


def _maintenance(url: URL) -> URL:
    return url.set(database="postgres")


def _engine(url: URL) -> Engine:
    return create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT", connect_args={"connect_timeout": 5})


@contextmanager
def _connection(*urls: URL) -> Iterator[Connection]:
    """A connection to the first of these databases that answers."""
    failure: Exception | None = None
    for url in urls:
        try:
            connection = _engine(url).connect()
        except OperationalError as error:
            failure = failure or error
            continue
        with connection:
            yield connection
        return
    said = str(getattr(failure, "orig", failure)).strip().splitlines()[0]
    raise PlatformError(
        f"Postgres at {urls[0].render_as_string(hide_password=True)} does not answer: {said}.",
        fix="Start it or correct RAGLINE_POSTGRES_URL; without that variable ragline starts its own.",
    )


def _create(connection: Connection, name: str) -> None:
    duplicate = ("42P04", "23505")  # created by another process a moment ago
    try:
        connection.execute(text('create database "{}"'.format(name.replace('"', '""'))))
    except DBAPIError as error:
        if getattr(error.orig, "pgcode", None) not in duplicate:
            said = str(error.orig).strip().splitlines()[0]
            raise PlatformError(
                f"cannot create the database {name!r}: {said}.",
                fix=f"Create it with this user as its owner: createdb {shlex.quote(name)}.",
            ) from None


def _databases(settings: Settings, dagster: URL, *, mlflow: str | None = None) -> Databases:
    """Create what is absent. Without a name, MLflow's database is a sibling: <dagster>_mlflow, or mlflow if only that exists."""
    own = str(dagster.database)
    preferred = mlflow or f"{own}_mlflow"
    with _connection(dagster, _maintenance(dagster)) as connection:
        present = set(connection.scalars(text("select datname from pg_database")))
        if own not in present:
            _create(connection, own)
        sibling = next((name for name in (preferred, "mlflow") if name in present), preferred)
        if settings.places.mlflow_url is None and sibling not in present:
            _create(connection, sibling)
    tracking = settings.places.mlflow_url
    if tracking is None:
        tracking = _text(dagster.set(database=sibling))
        _create_mlflow_tables(dagster.set(database=sibling))
    return Databases(dagster_url=_text(dagster), mlflow_url=tracking, dagster_home=_dagster_home(settings))


def _dagster_home(settings: Settings) -> Path:
    """The folder that Dagster's runs write to, with a copy of the configuration that is beside ragline.toml."""
    home, given = settings.home / "dagster", settings.root / "dagster_home" / "dagster.yaml"
    home.mkdir(parents=True, exist_ok=True)
    configuration, new = home / given.name, home / f".{given.name}.{os.getpid()}"
    if not configuration.is_file() or configuration.read_bytes() != given.read_bytes():
        shutil.copyfile(given, new)
        new.replace(configuration)
    return home


def _text(url: URL) -> str:
    """The URL with slashes of a socket folder unescaped: Alembic's configuration files choke on a percent sign."""
    return url.render_as_string(hide_password=False).replace("%2F", "/")


def _create_mlflow_tables(url: URL) -> None:
    """MLflow migrates a new database on first use and does not lock it; here one process does so and the others wait."""
    made = text("select to_regclass('alembic_version') is not null")
    with _connection(url) as connection:
        if connection.scalar(made):
            return
        connection.execute(text(f"select pg_advisory_lock({MLFLOW_LOCK})"))
        if connection.scalar(made):
            return
        from mlflow.store.db.utils import _initialize_tables, create_sqlalchemy_engine

        chatty = [logging.getLogger(name) for name in ("alembic", "mlflow.store.db.utils")]
        levels = [logger.level for logger in chatty]
        engine = create_sqlalchemy_engine(_text(url))  # type: ignore[no-untyped-call]
        try:
            for logger in chatty:
                logger.setLevel(logging.WARNING)
            _initialize_tables(engine)  # type: ignore[no-untyped-call]
        except SQLAlchemyError as error:
            raise PlatformError(
                f"MLflow's tables cannot be created: {error}.", fix="Drop its half-made database and start again."
            ) from None
        finally:
            for logger, level in zip(chatty, levels, strict=True):
                logger.setLevel(level)
            engine.dispose()
