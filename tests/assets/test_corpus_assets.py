"""The corpus in Dagster: what a run shows of documents and chunks, what its checks say, and versions that make staleness true."""

import dagster as dg
import pytest

from rag_assets.defs import contracts, corpus
from rag_assets.workbench import Workbench
from rag_serving.settings import Chunking, Corpus, ModelSpec, Settings
from rag_serving.store import LocalStore

pytestmark = pytest.mark.filterwarnings("ignore:module 'sre_:DeprecationWarning")  # great_expectations imports them

DEFINITIONS = [corpus.source_files, corpus.documents, corpus.chunks, corpus.nothing_lost, corpus.nothing_truncated]
CONTRACTS = [contracts.documents_contract, contracts.chunks_contract]


def materialized(root, *, window: int = 64, more=()):
    """One run of the corpus assets over the folder `docs`: metadata and data version by asset, and evaluations by check."""
    model = ModelSpec(name="h", source="hashing:8", dims=8, max_tokens=window)
    settings = Settings(
        root=root, corpus=Corpus(source="folder:docs"), chunking=Chunking(max_tokens=32), models=(model,), default_models=("h",)
    )
    bench = Workbench(settings, store=LocalStore(root / "store"))
    with dg.DagsterInstance.ephemeral() as instance:
        run = dg.materialize([*DEFINITIONS, *more], resources={"bench": bench}, instance=instance)
        assert run.success
        events = {event.asset_key.to_user_string(): event.materialization for event in run.get_asset_materialization_events()}
        facts = {name: {key: value.value for key, value in event.metadata.items()} for name, event in events.items()}
        versions = {name: event.tags["dagster/data_version"] for name, event in events.items()}
        return facts, versions, {each.check_name: each for each in run.get_asset_check_evaluations()}


@pytest.fixture
def docs(tmp_path):
    folder = tmp_path / "docs"
    folder.mkdir()
    for number in range(4):
        text = f"# Page {number}\n\nThe page tells about topic {number}.\n\n## Details\n\n" + f"More is said here of thing {number}. " * 12
        (folder / f"page{number}.md").write_text(text, encoding="utf-8")
    (folder / "copy.md").write_text((folder / "page0.md").read_text(encoding="utf-8"), encoding="utf-8")
    (folder / "broken.json").write_text("{", encoding="utf-8")
    return folder


def test_a_run_shows_counts_quarantine_and_checks(docs, tmp_path):
    """Counts, quarantine by reason, the profile and every check with what it observed are in the run; all of them pass here."""
    facts, _, checks = materialized(tmp_path, more=CONTRACTS)
    assert facts["documents"]["dagster/row_count"] + facts["documents"]["quarantined"] == 6
    assert sum(facts["documents"]["quarantine"]["reasons"].values()) == facts["documents"]["quarantined"]
    assert facts["documents"]["languages"] == {"en": 1.0}
    assert (facts["chunks"]["aliases"], facts["chunks"]["truncated"], facts["chunks"]["strategy"]) == (1, 0, "structure")
    assert all(check.passed for check in checks.values())
    assert {"documents_not_empty", "chunk_texts_present", "nothing_lost", "nothing_truncated"} <= set(checks)
    assert checks["doc_ids_unique"].metadata["rows"].value == facts["documents"]["dagster/row_count"]
    assert checks["doc_ids_unique"].metadata["data_docs"].value.startswith("file:")
    assert checks["nothing_lost"].metadata["documents"].value == facts["documents"]["dagster/row_count"]


def test_versions_follow_the_content(docs, tmp_path):
    """A second run has equal data versions throughout; a changed file moves those of documents and chunks."""
    _, first, _ = materialized(tmp_path)
    facts, second, _ = materialized(tmp_path)
    assert second == first
    assert facts["chunks"]["as_before"] is True
    (docs / "page1.md").write_text("# Page 1\n\nAnother text about the same page.", encoding="utf-8")
    facts, third, _ = materialized(tmp_path)
    assert all(third[name] != first[name] for name in ("source_files", "documents", "chunks"))
    assert (facts["documents"]["parsed"], facts["chunks"]["chunked"]) == (1, 1)


def test_truncation_warns_with_its_rate(docs, tmp_path):
    """A model that reads less than title and chunk take is told of, with the share of chunks, and stops nothing."""
    (docs / "long.md").write_text(f"# {'very ' * 30}long title\n\nA text under it.", encoding="utf-8")
    _, _, checks = materialized(tmp_path, window=24)
    check = checks["nothing_truncated"]
    assert (check.passed, check.severity) == (False, dg.AssetCheckSeverity.WARN)
    assert 0 < check.metadata["truncation_rate"].value < 0.2
