"""More clients at once than there is room for, and clients that leave: refusals say when to come back, and nothing is left behind."""

import asyncio
import json
import multiprocessing
import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import numpy as np
import pytest
from small_service import build, release, settings_for

from evals.bench.processes import running
from rag_serving.app import serve
from rag_serving.embedder import serve as serve_embedder
from rag_serving.store import LocalStore

PAGES = {f"s3.Page{number}": (f"Page {number}", f"Bucket {number} holds objects of kind {number % 7}.") for number in range(500)}
REFUSED = (429, 503)

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(600)]


@dataclass(frozen=True, slots=True)
class Reply:
    """Status (0: the connection ended without one), whether it said when to come back, and seconds from sending to the last byte."""

    status: int
    retry_after: bool
    seconds: float


@asynccontextmanager
async def service(root: Path) -> AsyncIterator[tuple[str, dict[str, int]]]:
    """The address of a query service beside its embedding service, each in a process of its own, and their process ids."""
    store, settings = LocalStore(root / "store"), settings_for(root)
    release(store, await asyncio.to_thread(build, store, settings, PAGES))
    async with running(serve_embedder, settings, models=["hashing"]) as vectors:
        (first,) = multiprocessing.active_children()
        places = settings.places.model_copy(update={"embedder_url": vectors, "store": root / "store"})
        serving = settings.serving.model_copy(update={"deadline_seconds": 2.8})
        async with running(serve, settings.model_copy(update={"places": places, "serving": serving})) as url:
            (second,) = set(multiprocessing.active_children()) - {first}
            assert first.pid
            assert second.pid
            yield url, {"query": second.pid, "embedding": first.pid}


def open_files(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def megabytes(pid: int) -> float:
    resident = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    return resident * 4096 / 1e6


def request(path: str, body: dict) -> bytes:
    raw = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
    return head.encode() + raw


async def asked(url: str, raw: bytes, *, together: asyncio.Event) -> Reply:
    """One request over a connection of its own, sent when all are connected."""
    target = urlsplit(url)
    reader, writer = await asyncio.open_connection(target.hostname, target.port)
    try:
        await together.wait()
        started = time.perf_counter()
        writer.write(raw)
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            length = next(int(line.split(":")[1]) for line in head.splitlines() if line.startswith("content-length:"))
            await reader.readexactly(length)
        except (asyncio.IncompleteReadError, ConnectionError):
            return Reply(0, retry_after=False, seconds=time.perf_counter() - started)
        return Reply(int(head.split()[1]), retry_after="\r\nretry-after:" in head, seconds=time.perf_counter() - started)
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


async def crowd(url: str, path: str, clients: int) -> list[Reply]:
    together = asyncio.Event()
    bodies = [request(path, {"query": f"Which objects does bucket {number} hold?"}) for number in range(clients)]
    calls = [asyncio.create_task(asked(url, raw, together=together)) for raw in bodies]
    await asyncio.sleep(1.0)
    together.set()
    return list(await asyncio.gather(*calls))


async def settled(url: str, pids: dict[str, int], before: dict[str, int]) -> dict[str, int]:
    """Open files of each process once nothing is under way any more."""
    async with httpx2.AsyncClient(base_url=url, trust_env=False, timeout=20) as client:
        deadline = time.monotonic() + 20
        while True:
            text = (await client.get("/metrics")).text
            idle = "rag_running_requests 0.0" in text and "rag_waiting_requests 0.0" in text
            now = {name: open_files(pid) for name, pid in pids.items()}
            if (idle and all(now[name] <= before[name] + 8 for name in pids)) or time.monotonic() > deadline:
                assert idle
                return now
            await asyncio.sleep(0.2)


@pytest.mark.parametrize("path", ["/v1/retrieve", "/v1/query"])
def test_a_thousand_clients_at_once(tmp_path, path):
    """1,000 clients that ask in one moment, three times: each is answered or told by 429 or 503 when to come back, and no connection breaks.

    Afterwards the processes are the same, with the open files that they had, and the next question is answered.
    """

    async def run() -> None:
        async with service(tmp_path) as (url, pids):
            await crowd(url, path, 50)
            before, resident = {name: open_files(pid) for name, pid in pids.items()}, megabytes(pids["query"])
            replies: list[Reply] = []
            for _ in range(3):
                replies += await crowd(url, path, 1000)
            after = await settled(url, pids, before)
            refused = [reply for reply in replies if reply.status in REFUSED]
            took = np.array([reply.seconds for reply in refused]) * 1000
            good = np.array([reply.seconds for reply in replies if reply.status == 200])
            print(
                f"{path}, 3 x 1,000 clients: {dict(Counter(reply.status for reply in replies))}; refusals after the crowd's first byte p50 "
                f"{np.percentile(took, 50):.0f} ms, p99 {np.percentile(took, 99):.0f} ms, {1000 * len(took) / took.max():.0f} a second; "
                f"answers p99 {np.percentile(good, 99):.2f} s; open files {before} -> {after}; "
                f"memory {resident:.0f} -> {megabytes(pids['query']):.0f} MB"
            )
            assert {reply.status for reply in replies} <= {200, *REFUSED}
            assert all(reply.retry_after for reply in refused)
            assert len(good) >= 16
            assert max(good) <= 3.0
            assert all(after[name] <= before[name] + 8 for name in pids)
            reply = httpx2.post(f"{url}{path}", json={"query": "Which objects?"}, trust_env=False, timeout=20)
            assert reply.status_code == 200

    asyncio.run(run())


def test_ten_thousand_clients_leave(tmp_path):
    """10,000 clients that leave at a moment of their own, streamed to or not: then 50 of 50 are answered, and no slot or file is held."""

    async def leave(url: str, raw: bytes, pause: float, room: asyncio.Semaphore) -> None:
        target = urlsplit(url)
        async with room:
            _, writer = await asyncio.open_connection(target.hostname, target.port)
            writer.write(raw)
            await asyncio.sleep(pause)
            writer.transport.abort()

    async def run() -> None:
        rng = random.Random(5)  # noqa: S311 - moments, no secret
        async with service(tmp_path) as (url, pids):
            await crowd(url, "/v1/query", 50)
            before, resident = {name: open_files(pid) for name, pid in pids.items()}, megabytes(pids["query"])
            started, room = time.monotonic(), asyncio.Semaphore(50)
            bodies = [{"query": f"Which objects does bucket {number} hold?", "stream": number % 2 == 0} for number in range(10_000)]
            raws = [request("/v1/query", body) for body in bodies]
            await asyncio.gather(*(leave(url, raw, rng.uniform(0, 0.05), room) for raw in raws))
            seconds = time.monotonic() - started
            after = await settled(url, pids, before)
            async with httpx2.AsyncClient(base_url=url, trust_env=False, timeout=20) as client:
                statuses = [(await client.post("/v1/query", json={"query": f"What is {number}?"})).status_code for number in range(50)]
            print(
                f"10,000 clients left in {seconds:.0f} s, then {statuses.count(200)}/50 answered; open files {before} -> {after}; "
                f"memory {resident:.0f} -> {megabytes(pids['query']):.0f} MB"
            )
            assert statuses == [200] * 50
            assert all(after[name] <= before[name] + 8 for name in pids)

    asyncio.run(run())
