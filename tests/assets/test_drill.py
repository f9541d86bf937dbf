"""The rollback drill on a line with two releases: what it proves, what it refuses, and that it touches nothing real."""

import os
import shutil
from dataclasses import asdict
from pathlib import Path

import dagster as dg
import pytest
from generated_corpus import released, settings_for, write_corpus

from rag_assets.drill import run_drill
from rag_assets.workbench import Workbench
from rag_serving.errors import ConfigError, DrillFailed, ModelMismatch, SnapshotError
from rag_serving.releases import Ledger
from rag_serving.seals import unsealed
from rag_serving.settings import Drift, ModelSpec, Rerank, RerankWeights
from rag_serving.snapshots import TABLE, snapshot_key


@pytest.fixture(scope="module")
def two_releases(tmp_path_factory) -> Path:
    """A folder with a corpus and a store whose ledger promoted hashing-128, then hashing-256. Not to be changed."""
    root = tmp_path_factory.mktemp("drill")
    write_corpus(root / "beir")
    bench = Workbench(settings_for(root))
    released(bench, "hashing-128")
    released(bench, "hashing-256")
    return root


@pytest.fixture
def root(two_releases, tmp_path) -> Path:
    shutil.copytree(two_releases, tmp_path / "line")
    return tmp_path / "line"


def workbench(root: Path, **changes) -> Workbench:
    return Workbench(settings_for(root, **changes))


def previous_folder(bench: Workbench) -> Path:
    return bench.store.folder(snapshot_key(Ledger(bench.store).state().previous.snapshot_id))


def contents(root: Path) -> dict[str, tuple[bytes, int]]:
    return {str(path.relative_to(root)): (path.read_bytes(), path.stat().st_mtime_ns) for path in root.rglob("*") if path.is_file()}


def test_the_previous_snapshot_answers_as_it_was_measured(root):
    """The previous release is restored in under 30 s, and all 50 probes return the documents that its evaluation recorded."""
    bench = workbench(root)
    drill = run_drill(bench)
    print(f"drill: {drill.seconds:.2f} s (restore {drill.restore_seconds:.2f}, open {drill.open_seconds:.2f}, {drill.probes} answers)")
    assert drill.snapshot_id == Ledger(bench.store).state().previous.snapshot_id
    assert drill.snapshot_id.startswith("hashing-128-")
    assert (drill.probes, drill.compared, drill.agreement) == (50, 50, 1.0)
    assert 0 < drill.seconds < 30


def test_a_reranked_snapshot_answers_as_it_was_measured(tmp_path):
    """A snapshot whose manifest orders passages by late interaction alone returns in the drill what its evaluation recorded."""
    write_corpus(tmp_path / "beir")
    bench = Workbench(settings_for(tmp_path, rerank=Rerank(method="maxsim", weights=RerankWeights(fused=0.0))))
    released(bench, "hashing-128")
    released(bench, "hashing-256")
    drill = run_drill(bench)
    assert (drill.compared, drill.agreement) == (50, 1.0)


def test_the_real_store_is_only_read(root):
    """Every file of the store is the same afterwards, to the byte and the modification time; beside them is the drill's record alone."""
    before, folders = contents(root / "store"), {path for path in (root / "store").rglob("*") if path.is_dir()}
    drill = run_drill(workbench(root))
    (record,) = (root / "store" / "drills").iterdir()
    assert unsealed(record.read_bytes()) | asdict(drill) == unsealed(record.read_bytes())
    shutil.rmtree(record.parent)
    assert contents(root / "store") == before
    assert {path for path in (root / "store").rglob("*") if path.is_dir()} == folders


def test_without_links_the_files_are_copied(root, monkeypatch):
    """On a file system that refuses hard links the drill copies, and ends the same."""
    real = os.link

    def refuse(source, target, **options):
        if TABLE in str(target):
            raise PermissionError(1, "Operation not permitted")
        real(source, target, **options)

    monkeypatch.setattr(os, "link", refuse)
    assert run_drill(workbench(root)).agreement == 1.0


def test_a_damaged_previous_snapshot_fails_by_file_name(root):
    """One flipped bit in the previous snapshot: the drill fails with that file's name and leaves no scratch folder."""
    bench = workbench(root)
    victim = max((path for path in previous_folder(bench).rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    with pytest.raises(SnapshotError, match=victim.name):
        run_drill(bench)
    assert not list((root / "store" / "snapshots").glob(".*"))


def test_a_missing_file_fails_by_its_name(root):
    """A file that is gone from the previous snapshot is named."""
    bench = workbench(root)
    victim = next(path for path in previous_folder(bench).rglob("*.lance") if path.is_file())
    victim.unlink()
    with pytest.raises(SnapshotError, match=victim.name):
        run_drill(bench)


def test_above_the_budget_it_fails_with_its_seconds(root):
    """A drill over drift.drill_budget_seconds fails and says where the time went."""
    with pytest.raises(DrillFailed, match=r"took \d+\.\d s \(restore .*0\.001 are allowed"):
        run_drill(workbench(root, drift=Drift(drill_budget_seconds=0.001)))


def test_a_swapped_embedding_model_fails(root):
    """Another model behind the previous snapshot's name: a rollback could not be served, so the drill fails."""
    models = (ModelSpec(name="hashing-128", source="hashing:128", dims=128, max_tokens=10),)
    with pytest.raises(ModelMismatch, match="hashing-128"):
        run_drill(workbench(root, models=models))


def test_a_model_that_is_no_longer_configured_fails(root):
    """The previous snapshot's model was removed from ragline.toml: the drill says so."""
    with pytest.raises(ConfigError, match="hashing-128"):
        run_drill(workbench(root, models=settings_for(root).models[2:]))


def test_other_answers_than_measured_fail(root, monkeypatch):
    """When the restored snapshot returns other documents than its evaluation recorded, the drill fails with the share."""
    monkeypatch.setattr("rag_assets.drill._expectation", lambda *_: {f"q{number}": ["d199"] for number in range(120)})
    with pytest.raises(DrillFailed, match=r"returned \d+\.\d% of the documents"):
        run_drill(workbench(root))


def test_another_eval_set_is_not_compared(root):
    """Probes of an eval set that the snapshot was not measured on are answered and timed, and compared with nothing."""
    lines = (root / "beir" / "queries.jsonl").read_text().splitlines()
    (root / "beir" / "queries.jsonl").write_text("\n".join([*lines[:-1], lines[-1].replace('"text": "', '"text": "please ')]))
    drill = run_drill(workbench(root))
    assert (drill.probes, drill.compared, drill.agreement) == (50, 0, 1.0)


def test_with_one_release_there_is_nothing_to_drill(root):
    """Without a previous release the drill is None, and the asset says so instead of failing."""
    from rag_assets.defs.drill import rollback_drill

    bench = workbench(root)
    (root / "store" / "releases" / "000002.json").unlink()
    assert run_drill(bench) is None
    (event,) = dg.materialize([rollback_drill], resources={"bench": bench}).asset_materializations_for_node("rollback_drill")
    assert event.metadata["outcome"].value == "nothing to roll back to yet"


def test_the_asset_shows_the_seconds_and_fails_with_the_drill(root):
    """The asset's metadata has the drill's figures and the budget; a failed drill fails the run."""
    from rag_assets.defs.drill import rollback_drill

    done = dg.materialize([rollback_drill], resources={"bench": workbench(root)})
    (event,) = done.asset_materializations_for_node("rollback_drill")
    assert 0 < event.metadata["seconds"].value < event.metadata["budget_seconds"].value == 30
    slow = workbench(root, drift=Drift(drill_budget_seconds=0.001))
    assert not dg.materialize([rollback_drill], resources={"bench": slow}, raise_on_error=False).success
