"""The command line as a user runs it: child processes, an own state folder, the real weights."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DATASETS = ROOT.parent / "shared" / "datasets"
SMALL = {"RAGLINE_CORPUS": "sample:small", "RAGLINE_EVAL_SET": "sample:small"}

Done = subprocess.CompletedProcess[str]
Command = Callable[..., Done]


def environment(home: Path, **variables: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAGLINE_", "DAGSTER_", "MLFLOW_"))}
    places = {"RAGLINE_HOME": str(home), "RAGLINE_MODELS_DIR": os.environ.get("RAGLINE_MODELS_DIR", str(ROOT / ".ragline" / "models"))}
    return {**kept, **places, "RAGLINE_ACTOR": "tester", "COLUMNS": "160", **variables}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "rag_assets", *arguments]


@pytest.fixture(scope="session")
def ragline() -> Command:
    """Run `ragline ARGS` in the checkout with state in `home`."""

    def run(home: Path, *arguments: str, timeout: float = 900, **variables: str) -> Done:
        return subprocess.run(
            command(*arguments),
            cwd=ROOT,
            env=environment(home, **variables),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run


def facts(done: Done) -> Any:
    """The JSON a command printed; its stderr when it failed."""
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="session")
def first_run(ragline: Command, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The state folder of one `ragline run` on the small sample with both default models, and the facts it printed. Not to be changed."""
    home = tmp_path_factory.mktemp("line")
    return home, facts(ragline(home, "run", "--json", **SMALL))


@pytest.fixture
def released(first_run: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    """A private copy of the store of `first_run`."""
    shutil.copytree(first_run[0] / "store", tmp_path / "home" / "store")
    return tmp_path / "home"
