"""What tests of the store, the snapshots and the releases share: stores with built snapshots, copied so that each test owns its bytes."""

import os
import shutil
from pathlib import Path

import pytest

from rag_serving.snapshots import Manifest
from rag_serving.store import LocalStore

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side; and how many threads compute is what some of them are about


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


@pytest.fixture(scope="session")
def two_built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest, Manifest]:
    """A store folder with two snapshots of the same pages in two editions. Read only: copy it to change it."""
    from small_service import two_snapshots

    root = tmp_path_factory.mktemp("two")
    return root, *two_snapshots(root)[1:]


@pytest.fixture
def two(two_built: tuple[Path, Manifest, Manifest], tmp_path: Path) -> tuple[LocalStore, Manifest, Manifest]:
    """A store of the test's own with two snapshots, the first of them released."""
    from small_service import release

    root, first, second = two_built
    shutil.copytree(root, tmp_path / "store")
    store = LocalStore(tmp_path / "store")
    release(store, first)
    return store, first, second
