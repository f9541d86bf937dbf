"""Corpus tables: parts of a table, one pointer, equal content whatever the parts, verified on reading."""

import hashlib

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rag_assets import corpus
from rag_assets.corpus import (
    TableWriter,
    current_table,
    fingerprint_of,
    read_table,
    stale_parts,
    table_batches,
    unchanged_table,
    whole_table,
)
from rag_assets.earlier import EarlierRows, RowIndex, StoredRows
from rag_serving.errors import StoreError
from rag_serving.store import LocalStore

SCHEMA = pa.schema([("uri", pa.string()), ("version", pa.string()), ("size", pa.int64()), ("acl", pa.list_(pa.string()))])
ROWS = [{"uri": f"u{number}", "version": f"v{number}", "size": number, "acl": ["all"] * (number % 3)} for number in range(10)]


@pytest.fixture
def small_parts(monkeypatch):
    """Parts of three rows."""
    monkeypatch.setattr(corpus, "PART_ROWS", 3)


def write(store, rows, *, made_from="one", basis="", schema=SCHEMA, name="things"):
    writer = TableWriter(store, name, schema)
    writer.extend(rows)
    return writer.finish(made_from=made_from, basis=basis)


def batches(store, **given):
    return list(table_batches(store, "things", **given))


def test_rows_come_back_part_by_part(store, small_parts):
    """Rows of several parts come back in order, whole and in batches of any size, with the columns asked for alone."""
    table = write(store, ROWS)
    assert [part.rows for part in table.parts] == [3, 3, 3, 1]
    read, rows = read_table(store, "things")
    assert (read, rows.to_pylist()) == (table, ROWS)
    found = batches(store, columns=["uri"], batch_rows=2)
    assert [batch.num_rows for batch in found] == [2, 1, 2, 1, 2, 1, 1]
    assert [row for batch in found for row in batch.to_pylist()] == [{"uri": row["uri"]} for row in ROWS]


def test_long_texts_make_small_parts(store, monkeypatch):
    """A part is closed when its texts are many characters, however few its rows."""
    monkeypatch.setattr(corpus, "PART_CHARACTERS", 100)
    table = write(store, [{**row, "uri": "x" * 60} for row in ROWS])
    assert [part.rows for part in table.parts] == [2] * 5


VALUES = st.one_of(st.none(), st.text(max_size=4))
ROW = st.fixed_dictionaries(
    {"text": VALUES, "size": st.one_of(st.none(), st.integers(-9, 9)), "acl": st.one_of(st.none(), st.lists(VALUES, max_size=2))}
)
MIXED = pa.schema([("text", pa.string()), ("size", pa.int64()), ("acl", pa.list_(pa.string()))])


@settings(deadline=None, max_examples=60)
@given(rows=st.lists(ROW, max_size=12), other=st.lists(ROW, max_size=12), size=st.integers(1, 5))
def test_content_is_equal_whatever_the_parts(tmp_path_factory, rows, other, size):
    """Equal rows in order have equal content hashes however they were cut into parts, and different rows never have the same."""
    store = LocalStore(tmp_path_factory.mktemp("store"))
    with pytest.MonkeyPatch.context() as patch:
        whole = write(store, rows, schema=MIXED)
        patch.setattr(corpus, "PART_ROWS", size)
        assert write(store, rows, schema=MIXED).content_sha256 == whole.content_sha256
        assert (write(store, other, schema=MIXED).content_sha256 == whole.content_sha256) == (rows == other)


def test_content_of_some_columns(store):
    """A column's identity does not move when another column changes."""
    one = write(store, ROWS)
    two = write(store, [{**row, "size": 0} for row in ROWS])
    assert one.content_sha256 != two.content_sha256
    assert one.content_of("uri", "acl") == two.content_of("uri", "acl")
    assert one.content_of("uri", "size") != two.content_of("uri", "size")


def test_an_interrupted_run_leaves_the_old_table(store, small_parts):
    """Parts written without an end are not current: the earlier table reads as before."""
    table = write(store, ROWS)
    writer = TableWriter(store, "things", SCHEMA)
    writer.extend({**row, "size": 99} for row in ROWS)
    sealed = writer.seal(made_from="two")
    assert sealed.content_sha256 != table.content_sha256
    assert read_table(store, "things") == (table, read_table(store, "things")[1])
    assert read_table(store, "things")[1].to_pylist() == ROWS


def test_an_empty_table_is_one(store):
    """A table without rows is written and read as such."""
    write(store, [])
    assert read_table(store, "things")[1].num_rows == 0
    assert sum(batch.num_rows for batch in batches(store)) == 0


def test_unchanged_only_from_the_same_inputs(store, small_parts):
    """The stored table counts as unchanged for what it was made from, while every part is there."""
    table = write(store, ROWS)
    assert unchanged_table(store, "things", made_from="two") is None
    again = unchanged_table(store, "things", made_from="one")
    assert again == table
    assert (again.reused, table.reused) == (True, False)
    (store.root / table.keys[1]).unlink()
    assert unchanged_table(store, "things", made_from="one") is None
    assert whole_table(store, "things") is None


def test_a_damaged_part_is_refused_before_its_first_row(store, small_parts):
    """A flipped bit is refused by name; the parts before it are still given, and writing the rows again repairs it."""
    table = write(store, ROWS)
    path = store.root / table.keys[1]
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    path.write_bytes(data)
    given = table_batches(store, "things")
    assert next(given).num_rows == 3
    with pytest.raises(StoreError, match=table.keys[1]):
        next(given)
    write(store, ROWS, made_from="two")
    assert read_table(store, "things")[1].to_pylist() == ROWS
    assert hashlib.sha256(path.read_bytes()).hexdigest() == table.parts[1].sha256


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"null", b'{"name": "x"}', b'{"parts": [1]}', b"\xff"])
def test_a_damaged_pointer_is_refused(store, data):
    """A pointer that is not one is a StoreError that says which file to delete."""
    store.write("corpus/things.json", data)
    with pytest.raises(StoreError, match=r"corpus/things\.json cannot be read\. Delete that file"):
        current_table(store, "things")


def test_absent_and_former_tables(store):
    """Before the first run there is no table, and reading it says what to run; a pointer of the layout before parts counts as none."""
    assert current_table(store, "chunks") is None
    with pytest.raises(StoreError, match="no table of chunks yet"):
        read_table(store, "chunks")
    store.write("corpus/chunks.json", b'{"name": "chunks", "sha256": "0", "content_sha256": "0", "made_from": "", "rows": 1}')
    assert current_table(store, "chunks") is None


def test_stale_parts_are_those_of_no_table(store, small_parts):
    """Parts of an earlier table are stale once they were left alone long enough; those of the current one never are."""
    first = write(store, ROWS)
    second = write(store, [*ROWS[:3], *({**row, "size": 99} for row in ROWS[3:])])
    gone = {f"things/{part.sha256}.parquet" for part in set(first.parts) - set(second.parts)}
    assert len(gone) == 3
    assert set(stale_parts(store, idle_days=-1)) == gone
    assert stale_parts(store, idle_days=1) == []
    for part in gone:
        store.remove(f"corpus/{part}")
    assert read_table(store, "things")[1].num_rows == 10


def test_stored_rows_by_position(store, small_parts):
    """Rows are found by position across parts, in the order asked for, repeats included."""
    rows = StoredRows(store, write(store, ROWS))
    assert [row["size"] for row in rows.take([9, 0, 4, 4, 3])] == [9, 0, 4, 4, 3]
    assert rows.take([]) == []


def test_row_index_knows_key_and_version(store, small_parts):
    """A key is found where it stands, and says whether its version is the one asked for; without a table nothing is found."""
    table = write(store, ROWS)
    positions, same = RowIndex(store, table, key="uri", version="version").find(["u7", "u2", "nowhere"], ["v7", "other", "v7"])
    assert (positions.tolist(), same.tolist()) == ([7, 2, -1], [True, False, False])
    positions, same = RowIndex(store, None, key="uri", version="version").find(["u7"], ["v7"])
    assert (positions.tolist(), same.tolist()) == ([-1], [False])


def test_earlier_rows_need_key_version_and_basis(store, small_parts):
    """Rows are taken over when key and version are equal and the basis is, and what was not asked for counts as removed."""
    write(store, ROWS, basis="b")
    same = EarlierRows(store, "things", key="uri", version="version", basis="b")
    assert same.unchanged(["u1", "u2", "new"], ["v1", "changed", "v"]) == {0: ROWS[1]}
    assert same.unchanged(["u9"], ["v9"]) == {0: ROWS[9]}
    assert same.removed == 7
    other = EarlierRows(store, "things", key="uri", version="version", basis="c")
    assert other.unchanged(["u1"], ["v1"]) == {}
    assert other.removed == 9


def test_fingerprint_is_of_the_values():
    """Equal values have equal fingerprints whatever the order of keys; different ones differ, nested ones too."""
    assert fingerprint_of({"a": 1, "b": [2]}) == fingerprint_of({"b": [2], "a": 1})
    assert len({fingerprint_of(each) for each in ("1", 1, [1], {"a": 1}, {"a": [1]}, None)}) == 6
    assert fingerprint_of("ab", "c") != fingerprint_of("a", "bc")
