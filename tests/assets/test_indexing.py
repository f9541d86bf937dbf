"""Building snapshots: same inputs same snapshot, unsound rows never published."""

import asyncio

import numpy as np
import pyarrow as pa
import pytest
from small_line import MODEL, build, chunk_table, passages, recipe_of, vectors_of

from rag_assets.freezing import Coverage, Health
from rag_assets.indexing import build_snapshot
from rag_assets.survey import survey
from rag_serving.errors import SnapshotError
from rag_serving.passages import embedded_text
from rag_serving.settings import Retrieval
from rag_serving.snapshots import hash_tree, snapshot_ids, verify


def attempt(store, chunks, vectors, titles, **changes):
    return asyncio.run(build_snapshot(store, recipe_of(chunks, **changes), chunks, vectors, titles, parent=None))


@pytest.mark.parametrize("hnsw_from_rows", [151, 150], ids=["exact", "indexed"])
def test_a_built_snapshot_is_sound(store, hnsw_from_rows):
    """A build publishes one verified snapshot with every row in every index; HNSW from the row threshold up."""
    manifest, health = build(store, passages(150), hnsw_from_rows=hnsw_from_rows)
    assert verify(store, manifest.snapshot_id) == manifest
    assert health.problems == []
    assert (health.coverage.rows, manifest.rows, manifest.documents, manifest.dims) == (150, 150, 150, 64)
    assert (manifest.built, manifest.parent, manifest.delta) == ("full", None, {})
    assert (manifest.fingerprint, manifest.embedding_model) == (MODEL.fingerprint, "hashing-64")
    wanted = {"content_idx", "title_idx", "acl_idx", "doc_id_idx", "uri_idx"} | (
        {"vector_idx", "title_vector_idx"} if hnsw_from_rows == 150 else set()
    )
    assert health.coverage.indexed_rows == dict.fromkeys(wanted, 150)
    assert health.self_retrieval >= 0.99
    assert health.ann_recall >= 0.95
    assert [path.name for path in (store.root / "snapshots").iterdir()] == [manifest.snapshot_id]


def test_the_same_recipe_builds_once(store):
    """The same inputs give the same snapshot without a build; changed rows, index or fusion settings give another."""
    first, _ = build(store, passages(20))
    before = hash_tree(store.root)
    assert build(store, passages(20)) == (first, None)
    assert hash_tree(store.root) == before
    others = [
        build(store, passages(21))[0],
        build(store, passages(20), hnsw_from_rows=10)[0],
        build(store, passages(20), retrieval=Retrieval(candidates=50))[0],
    ]
    assert len({first.snapshot_id, *(each.snapshot_id for each in others)}) == 4


def _rows(change):
    chunks = chunk_table(passages(300))
    vectors, titles = vectors_of(chunks)
    return change(chunks, vectors.copy(), titles.copy())


def _with(matrix, row, value):
    matrix[row] = value
    return matrix


UNSOUND = {
    "no rows": (lambda c, v, t: (c.slice(0, 0), v[:0], t[:0]), "no chunks to index"),
    "duplicate ids": (
        lambda c, v, t: (pa.concat_tables([c, c.slice(7, 1)]), np.vstack([v, v[:1]]), np.vstack([t, t[:1]])),
        "two chunks share an id",
    ),
    "NaN in one text vector": (lambda c, v, t: (c, _with(v, (299, 5), np.nan), t), r"1 of 300 text vectors"),
    "NaN in one title vector": (lambda c, v, t: (c, v, _with(t, (299, 5), np.nan)), r"1 of 300 title vectors"),
    "infinite": (lambda c, v, t: (c, _with(v, (299, 5), np.inf), t), r"1 of 300 text vectors"),
    "zero vector": (lambda c, v, t: (c, _with(v, 299, 0), t), r"1 of 300 text vectors"),
    "unnormalised": (lambda c, v, t: (c, v * 2, t), r"300 of 300 text vectors"),
    "float64": (lambda c, v, t: (c, v.astype(np.float64), t), "float64"),
    "wrong dims": (lambda c, v, t: (c, v[:, :32], t[:, :32]), r"\(300, 32\), expected \(300, 64\)"),
    "a vector too few": (lambda c, v, t: (c, v[:-1], t), r"\(299, 64\), expected \(300, 64\)"),
}


@pytest.mark.parametrize(("change", "match"), UNSOUND.values(), ids=UNSOUND.keys())
def test_unsound_rows_are_refused(store, change, match):
    """Rows that cannot make a sound index are refused by what is wrong with them, and the store stays as it was."""
    build(store, passages(10))
    before = hash_tree(store.root), snapshot_ids(store)
    with pytest.raises(SnapshotError, match=match):
        attempt(store, *_rows(change))
    assert (hash_tree(store.root), snapshot_ids(store)) == before


def test_freeze_checks_name_what_is_wrong():
    """A lost chunk, an orphan, an index that covers fewer rows than there are, or chunks that do not find themselves, stop a snapshot."""
    whole = Coverage(rows=10, lost=0, orphans=0, indexed_rows={"content_idx": 10})
    sound = Health(whole, self_retrieval=1.0, ann_recall=0.5)
    assert (sound.problems, whole.indexed, whole.conserved) == ([], True, True)
    torn = Coverage(rows=10, lost=2, orphans=1, indexed_rows={"content_idx": 9})
    assert (torn.indexed, torn.conserved) == (False, False)
    assert Health(torn, self_retrieval=0.5, ann_recall=1.0).problems == [
        "2 chunks are lost",
        "1 rows are orphans",
        "index content_idx covers 9 of 10 rows",
        "only 50.0% of sampled chunks find themselves first",
    ]


@pytest.mark.parametrize(
    ("titles", "distinctness"), [("abcd", 1), (["A", "a ", "b", ""], 0.5), (["", " ", "", ""], 0), ("aaaa", 0.25)], ids=str
)
def test_titles_count_by_how_distinct_they_are(titles, distinctness):
    """Distinctness is the share of different titles among documents, case and blanks aside; empty titles are none, and batches do not matter."""
    chunks = chunk_table(passages(4)).set_column(3, "title", pa.array(list(titles)))
    assert survey(chunks.to_batches()).title_distinctness == distinctness
    assert survey(chunks.to_batches(max_chunksize=1)).title_distinctness == distinctness


def test_a_survey_is_the_same_in_any_batches():
    """However rows come in batches, ids, contents and the sample of 200 rows are the same; a row's digest changes with each of its fields."""
    chunks = chunk_table(passages(500))
    whole, pieces = survey(chunks.to_batches()), survey(chunks.to_batches(max_chunksize=7))
    assert (whole.ids == pieces.ids).all()
    assert (whole.contents == pieces.contents).all()
    assert whole.sample.to_pylist() == pieces.sample.to_pylist()
    assert whole.sample.num_rows == 200
    for at, name in enumerate(chunks.schema.names):
        changed = chunks.slice(0, 1).to_pylist()[0]
        changed[name] += {str: "x", int: 1, list: ["x"]}[type(changed[name])]
        other = survey(pa.Table.from_pylist([changed], schema=chunks.schema).to_batches())
        assert other.contents[0] != whole.contents[0], chunks.schema.names[at]


def test_a_failed_build_leaves_no_folder(store, monkeypatch):
    """A freeze check that fails leaves nothing behind, visible or hidden."""
    monkeypatch.setattr(Health, "problems", property(lambda _: ["made to fail"]))
    with pytest.raises(SnapshotError, match="made to fail"):
        build(store, passages(10))
    assert list((store.root / "snapshots").iterdir()) == []


def test_identical_passages_are_sound(store):
    """Many chunks with the same text, as boilerplate gives, still make a snapshot: each finds one as near as itself."""
    manifest, health = build(store, ["the same words everywhere"] * 120, title="one title", hnsw_from_rows=100)
    assert manifest.rows == 120
    assert health.problems == []


@pytest.mark.parametrize(
    ("title", "text", "embedded"),
    [("T", "text", "T\ntext"), ("", "text", "text"), ("T", "T and more", "T and more"), ("T", "T", "T")],
)
def test_embedded_text(title, text, embedded):
    """A chunk is embedded with its title before it, unless the text begins with the title."""
    assert embedded_text(title, text) == embedded
