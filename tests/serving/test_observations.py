"""The observation log: every row once, no words unless asked for, and a store that fails costs rows, never a request."""

import asyncio
import io
import os
import signal
import subprocess
import sys
import threading
import time

import pyarrow.parquet as pq
import pytest

from rag_serving import observations
from rag_serving.observations import PREFIX, Observation, ObservationLog, encode
from rag_serving.settings import Canary
from rag_serving.store import LocalStore

QUICK = Canary(log_seconds=0.05)


def row(number: int = 0, **changes) -> Observation:
    return Observation("query", f"{number:032x}", "champion", 1, "hashing-000000000000", **changes)


def rows_of(store) -> list[dict]:
    parts = [f"{PREFIX}/{day}/{name}" for day in store.names(PREFIX) for name in store.names(f"{PREFIX}/{day}")]
    return [each for part in parts for each in pq.read_table(io.BytesIO(store.read(part))).to_pylist()]


async def until_true(check, *, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def test_a_row_comes_back_as_it_was(store):
    """What was observed is in the part under its column, with the milliseconds of each phase."""
    seen = row(
        canary=4,
        outcome="degraded",
        abstained=False,
        top_score=0.75,
        citations=2,
        cited=1.0,
        grounded=0.5,
        guards=("injection:flag",),
        degraded=("rerank",),
        total_ms=12.5,
        timings_ms={"encode": 2.5, "retrieve": 8.0},
    )
    store.write(f"{PREFIX}/2026-11-22/a.parquet", encode([seen], with_text=False))
    (found,) = rows_of(store)
    wanted = {"kind": "query", "arm": "champion", "release": 1, "canary": 4, "abstained": False, "top_score": 0.75, "grounded": 0.5}
    assert {name: found[name] for name in wanted} == wanted
    assert (found["guards"], found["degraded"], found["timings_ms"]) == (
        ["injection:flag"],
        ["rerank"],
        [("encode", 2.5), ("retrieve", 8.0)],
    )
    assert abs((found["at"] - seen.at).total_seconds()) < 0.001


@pytest.mark.parametrize("with_text", [True, False])
def test_words_are_kept_only_when_asked_for(with_text):
    """Neither the words of a query nor the id of a document is in a part without text; equal documents still look equal."""
    part = encode([row(query="who is Jane Roe", doc_ids=("private/roe.txt", "b")), row(doc_ids=("b",))], with_text=with_text)
    table = pq.read_table(io.BytesIO(part))
    first, second = table["doc_ids"].to_pylist()
    assert ("query" in table.column_names, first[0] == "private/roe.txt") == (with_text, with_text)
    assert first[1] == second[0]
    assert ("Jane Roe" in str(table.to_pylist())) is with_text


def test_rows_are_written_by_time_and_by_number(store):
    """A row that waits alone is written after `log_seconds`; `log_rows` of them at once. Stopping writes the rest, each row once."""

    async def run() -> None:
        log = ObservationLog(store, QUICK)
        log.start()
        log.add(row(1))
        await until_true(lambda: log.written == 1)
        await log.stop()
        log = ObservationLog(store, Canary(log_seconds=60, log_rows=10))
        log.start()
        for number in range(2, 12):
            log.add(row(number))
        await until_true(lambda: log.written == 10)
        log.add(row(12))
        await log.stop()
        assert (log.written, log.waiting, log.dropped) == (11, 0, 0)

    asyncio.run(run())
    assert sorted(int(each["trace_id"], 16) for each in rows_of(store)) == list(range(1, 13))


def test_a_store_that_fails_costs_no_row_while_memory_lasts(store, monkeypatch, caplog):
    """Rows wait while the store cannot be written, are dropped and counted beyond the bound, and are written once it can; it is logged once."""
    monkeypatch.setattr(observations, "MOST_WAITING", 100)
    store.root.mkdir()
    (store.root / PREFIX).write_text("a file where the folder should be")

    async def run() -> None:
        log = ObservationLog(store, QUICK)
        log.start()
        for number in range(150):
            log.add(row(number))
            if number % 50 == 0:
                await until_true(lambda: log._failing)
        assert (log.waiting, log.dropped, log.written) == (100, 50, 0)
        (store.root / PREFIX).unlink()
        await until_true(lambda: log.written == 100)
        log.add(row(200))
        await log.stop()
        assert (log.written, log.waiting) == (101, 0)

    asyncio.run(run())
    assert len(rows_of(store)) == 101
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"]


def test_a_full_disk_at_the_end_drops_and_ends(store):
    """Stopping with a store that cannot be written drops what waits, counts it, and returns."""
    store.root.mkdir()
    (store.root / PREFIX).write_text("a file where the folder should be")

    async def run() -> None:
        log = ObservationLog(store, QUICK)
        log.start()
        log.add(row())
        await log.stop()
        assert (log.dropped, log.written) == (1, 0)

    asyncio.run(run())


class SlowStore(LocalStore):
    """A store whose disk waits until it is let go."""

    def __init__(self, root) -> None:
        super().__init__(root)
        self.go, self.asked = threading.Event(), threading.Event()

    def create(self, key: str, data: bytes) -> None:
        self.asked.set()
        assert self.go.wait(20)
        super().create(key, data)


def test_a_slow_disk_stops_nobody_and_writes_each_row_once(tmp_path):
    """Rows are taken while a write hangs; stopping in the middle of it writes every row, none twice."""
    store = SlowStore(tmp_path / "slow")

    async def run() -> None:
        log = ObservationLog(store, QUICK)
        log.start()
        log.add(row(1))
        await until_true(store.asked.is_set)
        log.add(row(2))
        stopping = asyncio.create_task(log.stop())
        await asyncio.sleep(0.05)
        store.go.set()
        await stopping
        assert (log.written, log.dropped, log.waiting) == (2, 0, 0)

    asyncio.run(run())
    assert sorted(int(each["trace_id"], 16) for each in rows_of(store)) == [1, 2]


KILLED = """
import asyncio, sys, time
from pathlib import Path
from rag_serving.observations import Observation, ObservationLog
from rag_serving.settings import Canary
from rag_serving.store import LocalStore

async def run():
    log = ObservationLog(LocalStore(Path(sys.argv[1])), Canary(log_seconds=0.2))
    log.start()
    for number in range(1_000_000):
        log.add(Observation("query", f"{number:032x}", "champion", 1, "hashing-000000000000"))
        if number % 10 == 0:
            print(number, time.time(), log.written, flush=True)
        await asyncio.sleep(0.002)

asyncio.run(run())
"""


def test_a_killed_process_loses_only_its_last_rows(tmp_path):
    """After kill -9 every row that was told to be written is in the log, once, and no part is half."""
    command = [sys.executable, "-c", KILLED, str(tmp_path / "store")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        written = 0
        for line in process.stdout:
            written = int(line.split()[2])
            if written > 200:
                os.kill(process.pid, signal.SIGKILL)
                break
    store = LocalStore(tmp_path / "store")
    found = sorted(int(each["trace_id"], 16) for each in rows_of(store))
    assert found == list(range(len(found)))
    assert len(found) >= written > 200
