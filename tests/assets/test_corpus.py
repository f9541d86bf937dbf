"""Corpus tables: made once from the same inputs, verified on reading."""

import pytest

from rag_assets.corpus import SOURCE_FILES, current_table, derive, fingerprint_of, read_table
from rag_serving.errors import StoreError

ROWS = [{"uri": "a", "sha256": "0" * 64, "size": 1}, {"uri": "b", "sha256": "1" * 64, "size": 2}]


class Maker:
    """Gives rows and counts how often it was asked."""

    def __init__(self, rows=ROWS) -> None:
        self.rows = rows
        self.asked = 0

    def __call__(self) -> list[dict[str, object]]:
        self.asked += 1
        return self.rows


def made(store, maker, made_from="one"):
    return derive(store, "source_files", made_from=made_from, rows=maker, schema=SOURCE_FILES)


def test_rows_come_back(store):
    """A table reads back as it was made, with its row count."""
    table = made(store, Maker())
    read, rows = read_table(store, "source_files")
    assert (read, rows.to_pylist()) == (table, ROWS)
    assert (table.rows, table.reused) == (2, False)


def test_unchanged_inputs_are_not_read_again(store):
    """The same inputs give the stored table without asking for rows; other inputs ask."""
    maker = Maker()
    first = made(store, maker)
    again = made(store, maker)
    assert (maker.asked, again.reused, again.sha256) == (1, True, first.sha256)
    made(store, maker, made_from="two")
    assert maker.asked == 2
    made(store, maker)
    assert maker.asked == 3


def test_content_hash_follows_the_rows(store):
    """Equal rows from other inputs have the same content hash, so what is derived from them need not be made again; other rows have another."""
    first = made(store, Maker())
    same = made(store, Maker(), made_from="two")
    other = made(store, Maker(ROWS[:1]), made_from="three")
    assert same.content_sha256 == first.content_sha256 != other.content_sha256
    assert current_table(store, "source_files") == other


def test_a_damaged_table_is_refused_and_made_again(store):
    """A flipped bit is refused by name; deleting that file, as the error says, makes the next run make it again."""
    maker = Maker()
    table = made(store, maker)
    path = store.root / table.key
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match=table.key):
        read_table(store, "source_files")
    path.unlink()
    assert made(store, maker).reused is False
    assert read_table(store, "source_files")[1].to_pylist() == ROWS


def test_damage_is_repaired_when_inputs_change(store):
    """A damaged file is not taken for good because its name fits: making the same rows from other inputs writes it anew."""
    table = made(store, Maker())
    (store.root / table.key).write_bytes(b"damaged")
    made(store, Maker(), made_from="two")
    assert read_table(store, "source_files")[1].to_pylist() == ROWS


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"null", b'{"name": "x"}', b"\xff"])
def test_a_damaged_pointer_is_refused(store, data):
    """A pointer that is not one is a StoreError that says which file to delete."""
    store.write("corpus/source_files.json", data)
    with pytest.raises(StoreError, match=r"corpus/source_files\.json cannot be read\. Delete that file"):
        current_table(store, "source_files")


def test_absent_table(store):
    """Before the first run there is no table, and reading it says what to run."""
    assert current_table(store, "chunks") is None
    with pytest.raises(StoreError, match="no chunks in the store yet"):
        read_table(store, "chunks")


def test_fingerprint_is_of_the_values():
    """Equal values have equal fingerprints whatever the order of keys; different ones differ, nested ones too."""
    assert fingerprint_of({"a": 1, "b": [2]}) == fingerprint_of({"b": [2], "a": 1})
    assert len({fingerprint_of(each) for each in ("1", 1, [1], {"a": 1}, {"a": [1]}, None)}) == 6
    assert fingerprint_of("ab", "c") != fingerprint_of("a", "bc")
