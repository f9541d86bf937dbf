"""The command line as a user runs it: child processes, an own state folder, the real weights."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DATASETS = ROOT.parent / "shared" / "datasets"

Command = Callable[..., subprocess.CompletedProcess[str]]


def environment(home: Path, **variables: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAGLINE_", "DAGSTER_", "MLFLOW_"))}
    places = {"RAGLINE_HOME": str(home), "RAGLINE_MODELS_DIR": os.environ.get("RAGLINE_MODELS_DIR", str(ROOT / ".ragline" / "models"))}
    return {**kept, **places, "RAGLINE_ACTOR": "tester", "COLUMNS": "160", **variables}


@pytest.fixture
def ragline() -> Command:
    """Run `ragline ARGS` in the checkout with state in `home`."""

    def run(home: Path, *arguments: str, timeout: float = 900, **variables: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "rag_assets", *arguments]
        return subprocess.run(
            command, cwd=ROOT, env=environment(home, **variables), capture_output=True, text=True, timeout=timeout, check=False
        )

    return run


def facts(done: subprocess.CompletedProcess[str]) -> Any:
    """The JSON a command printed; its stderr when it failed."""
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
