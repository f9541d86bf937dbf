"""What chunks have from their documents in a snapshot: access lists and metadata, changed without embedding anything again."""

import asyncio
import json
import logging

import pyarrow as pa
import pytest
from small_line import SPEC

from rag_assets import ingestion, steps
from rag_assets.attributes import attributed_chunks, value_of
from rag_assets.workbench import LogReporter, Workbench
from rag_serving.errors import SnapshotError, StoreError
from rag_serving.filters import parse_filter
from rag_serving.retrieval import Retriever
from rag_serving.settings import Corpus, Index, Settings
from rag_serving.store import LocalStore

FILTERS = {"service": "text", "year": "number", "draft": "flag"}


class Shelf:
    """Documents in one JSON Lines file, and the line that reads them."""

    def __init__(self, root, filters) -> None:
        self.path = root / "documents.jsonl"
        settings = Settings(
            root=root,
            models=(SPEC,),
            default_models=(SPEC.name,),
            corpus=Corpus(source=f"jsonl:{self.path}"),
            index=Index(filters=filters, rebuild_share=1.0),
        )
        self.bench = Workbench(settings, store=LocalStore(root / "store"), reporter=LogReporter())
        self.rows = {
            f"d{number}": {
                "id": f"d{number}",
                "title": f"Title {number}",
                "text": f"Passage {number} of many words. " * 200,
                "metadata": {"service": f"s{number % 3}", "year": 2000 + number, "draft": number % 2 == 0},
                "acl": ["staff"] if number % 4 == 0 else [],
            }
            for number in range(20)
        }

    def snapshot(self):
        """The snapshot of the documents as they are now, and how many texts were embedded for it."""
        self.path.write_text("\n".join(map(json.dumps, self.rows.values())))
        steps.ingest_corpus(self.bench)
        before = self.bench.tally["embedded"]
        built = steps.snapshot_corpus(self.bench, SPEC.name)
        return built, self.bench.tally["embedded"] - before

    def found(self, manifest, *, where=None, groups=None):
        """The documents that a search for everything finds."""

        async def run():
            retriever = await Retriever.open(self.bench.store, manifest.snapshot_id)
            try:
                hits = await retriever.retrieve("passage", None, k=1000, where=where and parse_filter(where), groups=groups)
                return {hit.doc_id for hit in hits}
            finally:
                retriever.close()

        return asyncio.run(run())


@pytest.fixture
def shelf(tmp_path) -> Shelf:
    return Shelf(tmp_path, FILTERS)


def test_every_chunk_has_its_documents_attributes(shelf):
    """Each of a document's chunks is found under that document's metadata and access list and no other."""
    built, _ = shelf.snapshot()
    assert built.manifest.rows >= 40
    staff = {f"d{number}" for number in range(0, 20, 4)}
    assert shelf.found(built.manifest) == {*shelf.rows}
    assert shelf.found(built.manifest, groups=frozenset()) == {*shelf.rows} - staff
    assert shelf.found(built.manifest, where={"service": {"eq": "s1"}}) == {f"d{number}" for number in range(1, 20, 3)}
    assert shelf.found(built.manifest, where={"year": {"range": {"gt": 2016}}, "draft": {"eq": False}}) == {"d17", "d19"}
    batches = list(attributed_chunks(shelf.bench.store, FILTERS))
    restricted = sum(acl != ["*"] for batch in batches for acl in batch["acl"].to_pylist())
    assert 0 < restricted == built.manifest.restricted


@pytest.mark.parametrize(
    ("change", "finds"),
    [
        ({"acl": ["boss"]}, lambda shelf, manifest: "d1" not in shelf.found(manifest, groups=frozenset({"staff"}))),
        ({"metadata": {"service": "new"}}, lambda shelf, manifest: shelf.found(manifest, where={"service": {"eq": "new"}}) == {"d1"}),
    ],
    ids=["access list", "metadata"],
)
def test_a_change_beside_the_text_embeds_nothing(shelf, change, finds):
    """A new access list or filterable value makes a new snapshot out of the old one at once, and no text is embedded for it."""
    first, embedded = shelf.snapshot()
    assert embedded > 0
    shelf.rows["d1"] |= change
    second, embedded = shelf.snapshot()
    assert embedded == 0
    assert (second.manifest.built, second.manifest.parent) == ("incremental", first.manifest.snapshot_id)
    assert second.manifest.delta["changed"] == first.manifest.rows // 20
    assert finds(shelf, second.manifest)
    assert not finds(shelf, first.manifest)


def test_metadata_that_is_not_declared_changes_nothing(tmp_path):
    """Without declared filters, new metadata builds no snapshot."""
    shelf = Shelf(tmp_path, {})
    first, _ = shelf.snapshot()
    shelf.rows["d1"]["metadata"] = {"service": "new"}
    second, _ = shelf.snapshot()
    assert (second.manifest, second.reused) == (first.manifest, True)


def test_the_first_access_list_of_a_corpus(shelf):
    """A public corpus counts no restricted rows; with its first access list those rows are counted and closed."""
    for row in shelf.rows.values():
        row["acl"] = []
    first, _ = shelf.snapshot()
    shelf.rows["d3"]["acl"] = ["boss"]
    second, _ = shelf.snapshot()
    assert (first.manifest.restricted, second.manifest.restricted) == (0, first.manifest.rows // 20)
    assert shelf.found(second.manifest, groups=frozenset({"staff"})) == {*shelf.rows} - {"d3"}


def test_equal_texts_under_other_metadata_are_both_found(shelf):
    """A copy whose filterable metadata or access list differs has chunks of its own; one that is equal in all of them has none."""
    original = shelf.rows["d1"]
    shelf.rows["copy"] = original | {"id": "copy"}
    shelf.rows["other"] = original | {"id": "other", "metadata": original["metadata"] | {"service": "elsewhere"}}
    shelf.rows["closed"] = original | {"id": "closed", "acl": ["boss"]}
    built, _ = shelf.snapshot()
    assert shelf.found(built.manifest) == {*shelf.rows} - {"copy"}
    assert shelf.found(built.manifest, where={"service": {"eq": "elsewhere"}}) == {"other"}


def test_values_of_another_kind_are_left_empty_and_told(shelf, caplog):
    """A value that is not of its declared kind is found by no filter on it, and counted in a warning."""
    for name in ("d1", "d2"):
        shelf.rows[name]["metadata"] = {"year": "long ago"}
    with caplog.at_level(logging.WARNING, logger="ragline"):
        built, _ = shelf.snapshot()
    assert "2 documents have a year that is no number" in caplog.text
    assert shelf.found(built.manifest, where={"not": {"year": {"range": {"gte": 0}}}}) == {"d1", "d2"}


@pytest.mark.parametrize(
    ("value", "kind", "held"),
    [
        ("x", "text", "x"),
        (3, "text", "3"),
        (True, "text", "true"),
        (3, "number", 3.0),
        ("2.5", "number", 2.5),
        ("", "number", None),
        ("nan", "number", None),
        (10**400, "number", None),
        (True, "number", None),
        (False, "flag", False),
        ("True", "flag", True),
        (1, "flag", None),
        (None, "text", None),
    ],
)
def test_values(value, kind, held):
    """What a column holds of a metadata value; nothing for one that is not of the kind."""
    assert value_of(value, kind) == held


def test_a_chunk_without_its_document_is_refused(shelf):
    """Chunks whose documents are gone are not indexed, because nobody knows who may read them."""
    shelf.snapshot()
    del shelf.rows["d7"]
    shelf.path.write_text("\n".join(map(json.dumps, shelf.rows.values())))
    ingestion.list_source_files(shelf.bench)
    ingestion.parse_documents(shelf.bench)
    with pytest.raises(StoreError, match="'d7' of a chunk"):
        steps.snapshot_corpus(shelf.bench, SPEC.name)


def test_rows_without_an_access_list_make_no_snapshot(store):
    """Rows that do not say who may read them are refused before anything is built."""
    from small_line import chunk_table, passages, recipe_of, vectors_of

    from rag_assets.indexing import build_snapshot

    chunks = chunk_table(passages(10))
    for unsaid, match in ((chunks.drop_columns(["acl"]), "not chunks with acl"), (_emptied(chunks), "10 rows do not say who may read")):
        with pytest.raises(SnapshotError, match=match):
            asyncio.run(build_snapshot(store, recipe_of(chunks), unsaid, *vectors_of(chunks), parent=None))
    assert list((store.root / "snapshots").iterdir() if (store.root / "snapshots").exists() else ()) == []


def _emptied(chunks: pa.Table) -> pa.Table:
    at = chunks.schema.get_field_index("acl")
    return chunks.set_column(at, chunks.schema.field(at), pa.array([None, []] * 5, pa.list_(pa.string())))
