"""A serving machine has neither the pipeline nor torch: what it runs works without them."""

import json
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, environment
from small_service import release, two_snapshots

PIPELINE = (
    *("botocore", "dagster", "great_expectations", "honcho", "ir_measures", "matplotlib", "mlflow", "pandas", "psutil", "psycopg2"),
    *("scipy", "semantic_text_splitter", "sentence_transformers", "sqlalchemy", "tokenizers", "torch", "transformers"),
)


@pytest.fixture
def lean(tmp_path):
    """Run `ragline ARGS` where importing any package of the pipeline or of the models fails, on a store with two releases."""
    store, first, second = two_snapshots(tmp_path / "made")
    release(store, first)
    release(store, second)
    shutil.copytree(tmp_path / "made", tmp_path / "home" / "store")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        script = (
            f"import sys\nfor name in {PIPELINE!r}: sys.modules[name] = None\n"
            f"sys.argv = ['ragline', *{arguments!r}]\nfrom rag_assets.cli import main\nmain()\n"
        )
        environ = environment(tmp_path / "home", RAGLINE_SERVING_PORT="9")
        return subprocess.run(
            [sys.executable, "-c", script], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60, check=False
        )

    return run, first.snapshot_id


def test_a_serving_machine_looks_rolls_back_and_holds(lean):
    """status, releases, rollback, hold and lift need none of the pipeline's packages."""
    run, first = lean
    assert json.loads(run("status", "--json").stdout)["release"] == 2
    assert json.loads(run("rollback", "--json").stdout)["entry"]["snapshot_id"] == first
    assert run("hold", "--reason", "at night").returncode == 0
    assert len(json.loads(run("status", "--json").stdout)["holds"]) == 1
    assert run("lift", "--reason", "in the morning").returncode == 0
    assert len(json.loads(run("releases", "--json").stdout)["entries"]) == 5


def test_the_serving_process_needs_none_of_it(lean):
    """`ragline serve --help` and the application itself load without the pipeline's packages."""
    run, _ = lean
    assert run("serve", "--help").returncode == 0
    script = f"import sys\nfor name in {PIPELINE!r}: sys.modules[name] = None\nimport rag_serving.app, rag_serving.embedder"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
