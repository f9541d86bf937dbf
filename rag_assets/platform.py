"""Every process of the platform on one machine, from the Procfile: started together, watched, stopped together."""

import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil
from honcho.environ import parse_procfile
from honcho.manager import Manager
from honcho.printer import Printer
from rich.console import Console

from rag_assets.postgres import Databases, export, postgres
from rag_serving.edge.ports import port_is_free
from rag_serving.errors import PlatformError
from rag_serving.settings import Settings
from rag_serving.signals.exporting import ENDPOINTS
from rag_serving.writing.local_llm import fetch

MARK = "HONCHO_PLATFORM"
STOP_SECONDS = 10
POLL_SECONDS = 0.5
LOCAL_LLM_SECONDS = 120
TRACED = frozenset({"embedder", "serving", "webserver", "daemon"})  # the last two start the processes of runs
TRACES_EXPERIMENT = "0"  # MLflow's Default: it is there from the start


@dataclass(frozen=True)
class Service:
    """A process that listens: its line in the Procfile, the variable with its port, and the path that answers once it is ready."""

    process: str
    title: str
    variable: str
    port: int
    health: str

    def url(self, host: str) -> str:
        return f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{self.port}"  # noqa: S104 - compared, not bound


def services(settings: Settings) -> tuple[Service, ...]:
    """What `up` starts and waits for, in the order of the Procfile."""
    places = settings.places
    return (
        Service("webserver", "Dagster", "RAGLINE_DAGSTER_PORT", places.dagster_port, "/server_info"),
        Service("mlflow", "MLflow", "RAGLINE_MLFLOW_PORT", places.mlflow_port, "/health"),
        Service("embedder", "embedder", "RAGLINE_EMBEDDER_PORT", places.embedder_port, "/readyz"),
        Service("serving", "serving", "RAGLINE_SERVING_PORT", places.serving_port, "/livez"),
        Service("llm", "LLM", "RAGLINE_LLM_PORT", places.llm_port, "/health"),
    )


def up(settings: Settings, *, console: Console, procfile: Path | None = None, local_llm: bool = False) -> int:
    """Run the platform until Ctrl-C, SIGTERM or SIGHUP, or until one of its processes ends; call it from the main thread.

    With `local_llm` a language model of this machine runs too and writes the answers; its weights are downloaded first, once.

    Returns 0 when it was asked to stop, else the exit code of the process that ended first (1 if that was 0). Either way nothing is left
    running. Raises PlatformError when a port is taken or Postgres does not start.
    """
    path = procfile or settings.root / "Procfile"
    if not path.is_file():
        raise PlatformError(f"no Procfile at {path}.", fix="Run ragline in its checkout.")
    commands = dict(parse_procfile(path.read_text(encoding="utf-8")).processes)
    for given, process in ((settings.places.mlflow_url, "mlflow"), (settings.places.embedder_url, "embedder")):
        if given:
            commands.pop(process, None)
    if local_llm:
        fetch(settings)
    else:
        commands.pop("llm", None)
    settings = _with_chosen_ports(settings)
    awaited = tuple(service for service in services(settings) if service.process in commands)
    for service in awaited:
        _require_free(service, settings.places.host)
    with _stop_signals():
        try:
            with postgres(settings) as databases:
                return _run(commands, settings, databases, awaited, console=console)
        except KeyboardInterrupt:
            return 0


@contextmanager
def _stop_signals() -> Iterator[None]:
    """Within the block SIGTERM and SIGHUP interrupt as Ctrl-C does; afterwards all three mean what they meant before."""

    def interrupt(_signal: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGHUP, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _with_chosen_ports(settings: Settings) -> Settings:
    """Port 0 becomes a free one here, because the processes must agree on it."""
    chosen = {}
    with ExitStack() as held:
        for name in ("dagster_port", "mlflow_port", "embedder_port", "serving_port", "llm_port"):
            if getattr(settings.places, name) == 0:
                listener = held.enter_context(closing(socket.create_server((settings.places.host, 0))))
                chosen[name] = listener.getsockname()[1]
    return settings.model_copy(update={"places": settings.places.model_copy(update=chosen)})


def _require_free(service: Service, host: str) -> None:
    if port_is_free(host, service.port):
        return
    raise PlatformError(
        f"port {service.port} on {host}, which {service.title} needs, is taken{holder_of(service.port)}.",
        fix=f"Stop what listens there or set {service.variable} to another port.",
    )


def holder_of(port: int) -> str:
    """Who listens on that port, as a clause of a sentence; empty when nobody does or it cannot be told."""
    try:
        listening = [c.pid for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.laddr.port == port and c.pid]
        return f" by {psutil.Process(listening[0]).name()} (process {listening[0]})" if listening else ""
    except psutil.Error:
        return ""


def environment(settings: Settings, databases: Databases) -> dict[str, str]:
    """What every process of the platform sees: the databases, its ports, and absolute paths."""
    places = settings.places
    config = os.environ.get("RAGLINE_CONFIG")
    return {
        **os.environ,
        **export(databases),
        **({"RAGLINE_CONFIG": str(Path(config).resolve())} if config else {}),
        **{service.variable: str(service.port) for service in services(settings)},
        "RAGLINE_HOME": str(settings.home),
        "RAGLINE_HOST": places.host,
        # In the environment and not on the command line, where every user of the machine could read the password.
        "MLFLOW_BACKEND_STORE_URI": databases.mlflow_url,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # seven idle worker processes, 700 MB
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "PYTHONUNBUFFERED": "1",
    }


def llm_environment(settings: Settings) -> dict[str, str]:
    """What makes the services ask the local language model, and gives it the time it takes on a CPU."""
    service = next(service for service in services(settings) if service.process == "llm")
    return {
        "RAGLINE_LLM_URL": f"{service.url(settings.places.host)}/v1",
        "RAGLINE_LLM_MODEL": settings.local_llm.model,
        "RAGLINE_DEADLINE_SECONDS": str(settings.places.deadline_seconds or LOCAL_LLM_SECONDS),
        "RAGLINE_CONTEXT_TOKENS": str(settings.places.context_tokens or settings.local_llm.context_tokens),
    }


def tracing(settings: Settings) -> dict[str, str]:
    """Where the services send their traces: to MLflow, whose server takes OTLP, unless the environment names an endpoint.

    Only they are told: MLflow's own client in the other processes would send its traces there too.
    """
    if any(os.environ.get(name) for name in ENDPOINTS):
        return {}
    mlflow = next(service for service in services(settings) if service.process == "mlflow")
    url = (settings.places.mlflow_url or mlflow.url(settings.places.host)).rstrip("/")
    return {ENDPOINTS[0]: f"{url}/v1/traces", "OTEL_EXPORTER_OTLP_TRACES_HEADERS": f"x-mlflow-experiment-id={TRACES_EXPERIMENT}"}


class _Processes(Manager):  # type: ignore[misc]  # honcho has no types
    """Honcho's manager, with two differences: it says when a service answers, and it stops every descendant.

    Honcho signals process groups; servers here start workers in sessions of their own. So each process carries a mark in its environment,
    which its descendants inherit, and all that carry it get SIGTERM, and SIGKILL after STOP_SECONDS.
    """

    def __init__(self, announce: Callable[[threading.Event], None], output: IO[str]) -> None:
        super().__init__(Printer(output))
        self.mark = uuid.uuid4().hex
        self.ended_first: str | None = None
        self._stopping = threading.Event()
        self._announce = announce
        self._attendant = threading.Thread(target=self._attend, name="platform")

    def _start(self) -> None:
        super()._start()
        self._attendant.start()  # after the forks: a thread does not survive one

    def terminate(self) -> None:
        if not self._stopping.is_set():
            self.ended_first = next((name for name, process in self._processes.items() if "returncode" in process), None)
            self._stopping.set()

    def kill(self) -> None:
        """Does nothing: the attendant kills what outlives its time."""

    def finish(self) -> None:
        """Return when no process is left."""
        self.terminate()
        if self._attendant.ident is None:
            self._drain()
        else:
            self._attendant.join()

    def _attend(self) -> None:
        self._announce(self._stopping)
        self._stopping.wait()
        self._drain()

    def _drain(self) -> None:
        deadline = time.monotonic() + STOP_SECONDS
        asked: set[psutil.Process] = set()
        readers = [process["process"] for process in self._processes.values() if "process" in process]
        while (marked := _marked(self.mark)) or any(reader.is_alive() for reader in readers):
            late = time.monotonic() > deadline
            for process in marked:
                if late or process not in asked:
                    with suppress(psutil.Error):
                        process.send_signal(signal.SIGKILL if late else signal.SIGTERM)
            asked.update(marked)
            time.sleep(0.1)


def _marked(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _run(commands: dict[str, str], settings: Settings, databases: Databases, awaited: tuple[Service, ...], *, console: Console) -> int:
    def announce(stopping: threading.Event) -> None:
        _announce(awaited, settings.places.host, stopping, console=console)

    processes = _Processes(announce, console.file)
    env = {**environment(settings, databases), **(llm_environment(settings) if "llm" in commands else {}), MARK: processes.mark}
    for name, command in commands.items():
        told = tracing(settings) if name in TRACED else {}
        processes.add_process(name, command, env={**env, **told}, cwd=str(settings.root))
    try:
        processes.loop()
    finally:
        processes.finish()
    if processes.ended_first is None:
        console.print("Everything is stopped.")
        return 0
    code = int(processes.returncode or 1)
    console.print(f"[bold red]{processes.ended_first} ended with exit code {processes.returncode}[/]; everything else is stopped.")
    return code


def _announce(awaited: tuple[Service, ...], host: str, stopping: threading.Event, *, console: Console) -> None:
    """Print each URL once when it answers, and a summary when all do."""
    import httpx2

    waiting = list(awaited)
    with httpx2.Client(timeout=1.0, trust_env=False) as client:
        while waiting and not stopping.wait(POLL_SECONDS):
            for service in tuple(waiting):
                with suppress(httpx2.HTTPError):
                    if client.get(service.url(host) + service.health).is_success:
                        waiting.remove(service)
                        console.print(f"[green]{service.title}[/] is up at {service.url(host)}")
    if awaited and not waiting and not stopping.is_set():
        lines = [f"  {service.title:<9} {service.url(host)}" for service in awaited]
        console.print("\n[bold]Everything is up.[/] Ctrl-C stops it all.\n" + "\n".join(lines) + "\n")
