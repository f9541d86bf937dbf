"""What `ragline doctor` says of a machine, on real ports, files and databases."""

import socket
import time
from importlib.util import spec_from_file_location
from pathlib import Path

import pytest
from pydantic import SecretStr

from rag_assets import doctor
from rag_assets.doctor import Finding, examine
from rag_serving.edge.keys import create_key, revoke_key
from rag_serving.settings import ModelSpec, Places, Settings
from rag_serving.store import LocalStore

HASHING = ModelSpec(name="hashing", source="hashing:64", dims=64, max_tokens=512, dtype="auto")


def settings_of(root: Path, **places) -> Settings:
    """Settings that need nothing beyond what every machine with the tests has."""
    free = dict.fromkeys(("serving_port", "embedder_port", "dagster_port", "mlflow_port"), 0)
    return Settings(root=root, models=(HASHING,), default_models=("hashing",), places=Places(home=Path("state"), **{**free, **places}))


def find(findings: tuple[Finding, ...], name: str) -> Finding:
    return next(finding for finding in findings if finding.name == name)


@pytest.fixture
def without_postgres(monkeypatch):
    """Leaves out the one look that takes a second."""
    monkeypatch.delitem(doctor.LOOKS, "postgres")


def test_a_working_machine_is_well(tmp_path):
    """Where the tests run everything is well, the embedded Postgres really starts, nothing of it stays, and no fix is proposed."""
    started = time.monotonic()
    findings = examine(settings_of(tmp_path))
    assert [finding for finding in findings if not finding.ok or finding.fix] == []
    assert "PostgreSQL 18" in find(findings, "postgres").detail
    assert not (tmp_path / "state/postgres").exists()
    assert time.monotonic() - started < 30


def test_taken_port(tmp_path, without_postgres):
    """A taken port names its number and the variable that moves it; the other ports are judged by themselves."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        findings = examine(settings_of(tmp_path, mlflow_port=port))
    taken = find(findings, "port of MLflow")
    assert not taken.ok
    assert str(port) in taken.detail
    assert "RAGLINE_MLFLOW_PORT" in taken.fix
    assert find(findings, "port of Dagster").ok


def test_unreachable_postgres_is_a_finding(tmp_path):
    """A given Postgres that does not answer is one finding with its fix and without its password; the rest is still looked at."""
    findings = examine(settings_of(tmp_path, postgres_url=SecretStr("postgresql://me:hidden@127.0.0.1:1/dagster")))
    postgres = find(findings, "postgres")
    assert not postgres.ok
    assert "does not answer" in postgres.detail
    assert postgres.fix
    assert "hidden" not in str(findings)
    assert find(findings, "corpus").ok


def test_store_that_cannot_be_written(tmp_path, without_postgres):
    """A store path that is a file is a finding, not a traceback."""
    (tmp_path / "occupied").write_text("")
    store = find(examine(settings_of(tmp_path, store=Path("occupied"))), "store")
    assert not store.ok
    assert store.fix


@pytest.mark.parametrize(("cuda", "ok"), [("None", True), ("'13.0'", False)])
def test_cuda_build_of_torch(tmp_path, monkeypatch, without_postgres, cuda, ok):
    """A CUDA build of torch is told from a CPU build by its version file, without importing it."""
    (tmp_path / "version.py").write_text(f"__version__ = '2.13.0'\ncuda: Optional[str] = {cuda}\nhip: Optional[str] = None\n")
    monkeypatch.setattr(doctor, "find_spec", lambda name: spec_from_file_location(name, tmp_path / "__init__.py"))
    torch = find(examine(settings_of(tmp_path)), "torch")
    assert torch.ok is ok
    assert torch.detail.startswith("2.13.0, ")


def test_model_folder_that_is_missing(tmp_path, without_postgres):
    """A default model whose source is a folder that is not there is a finding; one that is fetched on first use is not."""
    base = settings_of(tmp_path)
    local = ModelSpec(name="local", source="path:absent", dims=8, max_tokens=8, dtype="auto")
    remote = ModelSpec(name="remote", source="wheel:all-MiniLM-L6-v2", dims=384, max_tokens=256, dtype="auto")
    findings = examine(base.model_copy(update={"models": (local, remote), "default_models": ("local", "remote")}))
    assert not find(findings, "model local").ok
    assert "fetches" in find(findings, "model remote").detail
    (tmp_path / "state/models/all-MiniLM-L6-v2-0123456789ab").mkdir(parents=True)
    assert (
        "weights are in"
        in find(examine(base.model_copy(update={"models": (remote,), "default_models": ("remote",)})), "model remote").detail
    )


def test_no_models(tmp_path, without_postgres):
    """A configuration without models is named as such."""
    configuration = find(examine(Settings(root=tmp_path, places=Places(home=Path("state")))), "configuration")
    assert not configuration.ok
    assert "ragline.toml" in configuration.fix


def test_api_keys_are_looked_at(tmp_path, without_postgres):
    """Keys in force are counted; with none left that may query, or a damaged record, nobody is told a working machine."""
    settings = settings_of(tmp_path)
    assert find(examine(settings), "API keys").detail == "none: this machine alone may ask"
    store = LocalStore(settings.store_dir)
    create_key(store, "page", scopes=["query"], actor="tester")
    create_key(store, "scraper", scopes=["read"], actor="tester")
    well = find(examine(settings), "API keys")
    assert (well.ok, well.detail) == (True, "2 made, 2 in force, 1 that may query")
    revoke_key(store, "page", actor="tester", reason="lost")
    useless = find(examine(settings), "API keys")
    assert (useless.ok, useless.detail) == (False, "2 made, 1 in force, 0 that may query")
    assert "ragline keys create" in useless.fix
    (settings.store_dir / "access/keys/scraper.json").write_text("{}")
    damaged = find(examine(settings), "API keys")
    assert not damaged.ok
    assert "access/keys/scraper.json" in damaged.detail
    assert damaged.fix


def test_a_reachable_service_without_keys(tmp_path, without_postgres):
    """A host that other machines reach needs a key before it serves, and doctor says so first."""
    open_to_all = find(examine(settings_of(tmp_path, host="0.0.0.0")), "API keys")  # noqa: S104 - never listened on
    assert not open_to_all.ok
    assert "ragline keys create" in open_to_all.fix
