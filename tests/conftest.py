"""What tests of the store, the snapshots and the releases share: stores with built snapshots, copied so that each test owns its bytes."""

import shutil
from pathlib import Path

import pytest

from rag_serving.snapshots import Manifest
from rag_serving.store import LocalStore


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Manifest]]:
    """A store folder with snapshots of 40, 40, 30 and 150 rows; the last has HNSW indexes. Read only: copy it to change it."""
    from small_line import build, passages

    root = tmp_path_factory.mktemp("built")
    made = LocalStore(root)
    manifests = [build(made, passages(rows, tag=tag))[0] for rows, tag in ((40, "first"), (40, "second"), (30, "short"))]
    manifests.append(build(made, passages(150, tag="indexed"), hnsw_from_rows=100)[0])
    return root, manifests


@pytest.fixture
def line(built: tuple[Path, list[Manifest]], tmp_path: Path) -> tuple[LocalStore, list[Manifest]]:
    """A private copy of `built`."""
    shutil.copytree(built[0], tmp_path / "line")
    return LocalStore(tmp_path / "line"), built[1]
