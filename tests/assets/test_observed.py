"""Reading what serving observed: every row once, whatever a merger left behind, and only the days that are kept."""

from datetime import UTC, datetime, timedelta

import pytest

from rag_assets.observations import rows_since, tidy
from rag_serving.observations import PREFIX, Observation, encode
from rag_serving.store import LocalStore

NOON = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)


def observe(store, at, *numbers, canary=2, **changes) -> str:
    """A part as serving writes it, with a row for each number."""
    rows = [Observation("query", f"{number:032x}", "champion", 1, "s", canary=canary, at=at, **changes) for number in numbers]
    key = f"{PREFIX}/{at:%Y-%m-%d}/{at:%H%M%S.%f}-{numbers[0]:08x}.parquet"
    store.create(key, encode(rows, with_text=False))
    return key


def numbers(store, *, since=NOON - timedelta(days=9), most=1000, canary=2) -> list[int]:
    rows = rows_since(store, since, columns=("trace_id",), canary=canary, most=most)
    return [int(row["trace_id"], 16) for row in rows]


def test_rows_of_a_canary_in_order_of_time(store):
    """Those of its entry and since then, oldest first, and no more than asked for."""
    observe(store, NOON + timedelta(hours=3), 5, 6)
    observe(store, NOON, 1, 2)
    observe(store, NOON + timedelta(days=1), 7)
    observe(store, NOON, 9, canary=None)
    observe(store, NOON, 10, canary=4)
    assert numbers(store) == [1, 2, 5, 6, 7]
    assert numbers(store, canary=4) == [10]
    assert numbers(store, since=NOON + timedelta(hours=2)) == [5, 6, 7]
    assert numbers(store, most=3) == [1, 2, 5]
    assert numbers(store, canary=3) == []


def test_an_unreadable_part_is_passed_over(store, caplog):
    """One bad file does not hide the others from who watches; it is named."""
    observe(store, NOON, 1)
    store.write(f"{PREFIX}/2026-11-22/130000.parquet", b"not parquet")
    assert numbers(store) == [1]
    assert "130000.parquet" in caplog.text


def test_hours_that_are_over_become_one_part(store):
    """Parts of a past hour are merged, the present hour is left alone, and doing it again changes nothing; every row is there once."""
    for number in range(6):
        observe(store, NOON + timedelta(minutes=20 * number), number)
    now = NOON + timedelta(hours=2, minutes=20)
    assert tidy(store, keep_days=30, now=now) == 3
    assert tidy(store, keep_days=30, now=now) == 0
    names = store.names(f"{PREFIX}/2026-11-22")
    assert sorted(name[:9] for name in names) == ["130000.00", "132000.00", "134000.00", "merged-12"]
    assert numbers(store) == list(range(6))
    assert numbers(store, since=NOON + timedelta(hours=1)) == [3, 4, 5]


class Interrupted(Exception):
    """The process ended here."""


@pytest.mark.parametrize("removed", [0, 1, 2])
def test_an_interrupted_merger_loses_and_doubles_nothing(store, monkeypatch, removed):
    """Stopped after any of its removals, each row counts once, then and after the next merger."""
    for number in range(3):
        observe(store, NOON + timedelta(minutes=number), number)
    taken, remove = [], store.remove

    def stopping(key: str) -> None:
        if len(taken) == removed:
            raise Interrupted
        taken.append(key)
        remove(key)

    monkeypatch.setattr(store, "remove", stopping)
    with pytest.raises(Interrupted):
        tidy(store, keep_days=30, now=NOON + timedelta(hours=3))
    assert numbers(store) == [0, 1, 2]
    monkeypatch.undo()
    assert tidy(store, keep_days=30, now=NOON + timedelta(hours=3)) == 3 - removed
    assert numbers(store) == [0, 1, 2]
    assert len(store.names(f"{PREFIX}/2026-11-22")) == 1


def test_a_damaged_part_is_not_merged_away(store, caplog):
    """An hour with a part that cannot be read stays as it is, and the part is named; other hours are merged."""
    observe(store, NOON, 1)
    store.write(f"{PREFIX}/2026-11-22/120500.parquet", b"not parquet")
    for number in (2, 3):
        observe(store, NOON + timedelta(minutes=60 + number), number)
    assert tidy(store, keep_days=30, now=NOON + timedelta(hours=5)) == 2
    assert "120500" in caplog.text
    assert store.exists(f"{PREFIX}/2026-11-22/120500.parquet")
    assert numbers(store) == [1, 2, 3]


def test_a_late_part_of_a_merged_hour_still_counts(store):
    """A part that came after its hour was merged is read beside the merged one."""
    observe(store, NOON, 1)
    observe(store, NOON + timedelta(minutes=1), 2)
    assert tidy(store, keep_days=30, now=NOON + timedelta(hours=3)) == 2
    observe(store, NOON + timedelta(minutes=59), 3)
    assert tidy(store, keep_days=30, now=NOON + timedelta(hours=3)) == 0
    assert numbers(store) == [1, 2, 3]


class Watched(LocalStore):
    """A store that counts what is read of it, and does something before the first read."""

    def __init__(self, root, before=lambda: None) -> None:
        super().__init__(root)
        self.read_keys: list[str] = []
        self._before = before

    def read(self, key):
        before, self._before = self._before, lambda: None
        before()
        self.read_keys.append(key)
        return super().read(key)


def test_a_part_that_is_merged_while_it_is_looked_for_counts_once(store):
    """Parts that go into a merged one between the listing and the reading are read there: no row is lost to who watches, and none is twice."""
    for number in range(4):
        observe(store, NOON + timedelta(minutes=number), number)
    watched = Watched(store.root, before=lambda: tidy(store, keep_days=30, now=NOON + timedelta(hours=3)))
    assert numbers(watched) == [0, 1, 2, 3]
    assert store.names(f"{PREFIX}/2026-11-22") == ["merged-12.parquet"]


def test_a_merged_part_that_goes_away_is_nothing(store):
    """A day that is taken away while its merged parts are looked at counts no more, and stops nobody."""
    for number in range(4):
        observe(store, NOON + timedelta(minutes=number), number)
    tidy(store, keep_days=30, now=NOON + timedelta(hours=3))
    observe(store, NOON + timedelta(days=2), 9)
    assert numbers(Watched(store.root, before=lambda: store.remove(f"{PREFIX}/2026-11-22"))) == [9]


def test_merged_parts_are_read_once(store):
    """Whoever watches a canary asks twice a minute: a merged part, which never changes, is not read again; one that is new is."""
    for number in range(4):
        observe(store, NOON + timedelta(minutes=number), number)
    tidy(store, keep_days=30, now=NOON + timedelta(hours=3))
    watched = Watched(store.root)
    assert numbers(watched) == [0, 1, 2, 3]
    watched.read_keys.clear()
    late = observe(store, NOON + timedelta(hours=1), 4)
    assert numbers(watched) == [0, 1, 2, 3, 4]
    assert watched.read_keys == [late]


def test_days_beyond_the_limit_go(store):
    """Whole days that ended longer ago than is kept are taken away, others stay."""
    for days in (40, 31, 29, 0):
        observe(store, NOON - timedelta(days=days), days + 1)
    assert tidy(store, keep_days=30, now=NOON) == 2
    assert numbers(store, since=NOON - timedelta(days=99)) == [30, 1]
