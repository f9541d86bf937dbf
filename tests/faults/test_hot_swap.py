"""Releases change under traffic: no request fails, each sees one snapshot, and memory comes back.

The history of a run, every request with the time it was sent and answered, is checked against the ledger afterwards.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise

import httpx2
import numpy as np
import psutil
import pytest
from own_process import environment, free_port, process
from small_service import PAGES, build, release, serving, settings_for
from steady_load import Asked, steady

from rag_serving.promotion import rollback
from rag_serving.releases import Action, Entry, Ledger, fold
from rag_serving.settings import Access, Admission
from rag_serving.snapshots import Manifest
from rag_serving.store import LocalStore

QUESTIONS = ("How do I delete a bucket?", "stop a running instance", "list the objects of a bucket", "encrypt plaintext with a key")
CONFIG = """
[access]
requests_per_minute = 0
tokens_per_day = 0

[[models]]
name = "hashing"
source = "hashing:64"
dims = 64
max_tokens = 128
"""


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request with what its reply named, and every text that stood in it."""

    asked: Asked
    snapshot_id: str = ""
    number: int = 0
    texts: frozenset[str] = frozenset()

    @classmethod
    def of(cls, asked: Asked) -> "Exchange":
        body = asked.body
        texts = frozenset([*(hit["text"] for hit in body.get("hits", ())), *(quote["text"] for quote in body.get("quotes", ()))])
        return cls(asked, body.get("snapshot_id", ""), body.get("release", 0), texts)

    @property
    def milliseconds(self) -> float:
        return self.asked.seconds * 1000


def pages(number: int, *, copies: int = 1) -> dict[str, tuple[str, str]]:
    """The small corpus in an edition of its own: every text ends in its number."""
    return {
        f"{doc_id}.{copy}": (title, f"{text} Copy {copy}. Edition {number}.")
        for copy in range(copies)
        for doc_id, (title, text) in PAGES.items()
    }


def name_canary(store: LocalStore, manifest: Manifest) -> Entry:
    state = Ledger(store).state()
    named = {"snapshot_id": manifest.snapshot_id, "manifest_sha256": manifest.sha256}
    evidence = {"champion": state.champion.snapshot_id}
    return Ledger(store).append(Action.CANARY, after=state.number, actor="tester", reason="to try it", evidence=evidence, **named)


async def traffic(url: str, *, a_second: float, until: Callable[[], bool]) -> list[Exchange]:
    """The history of a steady load, by the time the requests were sent."""
    asked = await steady(url, lambda number: QUESTIONS[number % len(QUESTIONS)], a_second=a_second, until=until)
    return [Exchange.of(each) for each in asked]


def check_history(history: Sequence[Exchange], entries: Sequence[Entry], texts: dict[str, set[str]]) -> None:
    """No request failed; each named one release with its snapshot and held that snapshot's texts alone; no later request saw an earlier release."""
    assert Counter(exchange.asked.code for exchange in history if exchange.asked.status != 200) == {}
    live = {}
    for count in range(1, len(entries) + 1):
        champion = fold(entries[:count]).champion
        live[champion.number] = champion.snapshot_id
    for exchange in history:
        assert live[exchange.number] == exchange.snapshot_id
        assert exchange.texts <= texts[exchange.snapshot_id]
    newest_seen, answered = 0, sorted(history, key=lambda exchange: exchange.asked.received)
    position = 0
    for exchange in history:
        while answered[position].asked.received < exchange.asked.sent:
            newest_seen = max(newest_seen, answered[position].number)
            position += 1
        assert exchange.number >= newest_seen


def test_swaps_under_traffic_keep_one_snapshot_a_request(tmp_path):
    """Promotions, two of them by way of a canary, and a rollback, as fast as the service follows them: the history is as promised."""
    store, settings = LocalStore(tmp_path / "store"), settings_for(tmp_path)
    patient = settings.serving.model_copy(update={"deadline_seconds": 60.0})  # a busy machine is not what is tested
    settings = settings.model_copy(
        update={"serving": patient, "admission": Admission(queue=10_000), "access": Access(requests_per_minute=0, tokens_per_day=0)}
    )
    manifests = [build(store, settings, pages(number)) for number in range(4)]
    texts = {manifest.snapshot_id: {text for _, text in pages(number).values()} for number, manifest in enumerate(manifests)}
    texts = {snapshot_id: {*whole, *(_sentences(whole))} for snapshot_id, whole in texts.items()}
    release(store, manifests[0])

    def move(client: httpx2.Client) -> None:
        for number, manifest in enumerate(manifests[1:]):
            if number % 2 == 0:
                name_canary(store, manifest)
                followed(client, Ledger(store).last_number())
            followed(client, release(store, manifest).number)
        followed(client, rollback(store, actor="tester", reason="back").number)

    async def run(client: httpx2.Client) -> list[Exchange]:
        moving = asyncio.create_task(asyncio.to_thread(move, client))
        history = await traffic(str(client.base_url), a_second=20, until=moving.done)
        await moving
        return history

    with serving(settings, store) as client:
        history = asyncio.run(run(client))
    check_history(history, Ledger(store).entries(), texts)
    assert len({exchange.number for exchange in history}) > 1


def followed(client: httpx2.Client, number: int, *, seconds: float = 60) -> float:
    """Wait until the service has read entry `number` and serves the champion of then; the seconds it took."""
    started = time.monotonic()
    while True:
        body = client.get("/v1/release").json()
        if body["number"] >= number and body["open"] and body["open"]["release"] == body["champion"]["number"]:
            return time.monotonic() - started
        assert time.monotonic() < started + seconds, body
        time.sleep(0.1)  # often enough, and little beside the load


def _sentences(texts: set[str]) -> set[str]:
    """What an extractive answer may quote of the texts."""
    from rag_serving.writing.extraction import sentences

    return {sentence for text in texts for sentence in sentences(text)}


@pytest.mark.heavy
@pytest.mark.timeout(900)
def test_twenty_promotions_in_two_minutes(tmp_path, capsys):
    """20 promotions, every second one by way of a canary that is shadowed, under 30 requests a second for 120 s over real processes.

    0 failed requests, each sees one snapshot, each snapshot was live at a moment of the request but for the seconds that following takes, and
    the resident memory of the service is within 10 % of what it was after the first two swaps.
    """
    (tmp_path / "ragline.toml").write_text(CONFIG)
    serving_port, embedder_port = free_port(), free_port()
    places = {"RAGLINE_HOME": str(tmp_path), "RAGLINE_SERVING_PORT": str(serving_port), "RAGLINE_EMBEDDER_PORT": str(embedder_port)}
    environ = environment(**places)
    store, settings = LocalStore(tmp_path / "store"), settings_for(tmp_path)
    manifests = [build(store, settings, pages(number, copies=60)) for number in range(23)]
    texts = {manifest.snapshot_id: {text for _, text in pages(number, copies=60).values()} for number, manifest in enumerate(manifests)}
    texts = {snapshot_id: {*whole, *_sentences(whole)} for snapshot_id, whole in texts.items()}
    release(store, manifests[0])
    url, lags, memory = f"http://127.0.0.1:{serving_port}", [], []

    def move(service: psutil.Process, client: httpx2.Client) -> None:
        began = time.monotonic()
        for number, manifest in enumerate(manifests[1:], start=-1):  # two swaps warm up, twenty are spread over 120 s
            time.sleep(max(0.0, began + 6.0 * (number + 2) - 5.0 - time.monotonic()))
            if number % 2:
                name_canary(store, manifest)
                time.sleep(2.0)
            lags.append(followed(client, release(store, manifest).number))
            if number == 0:
                time.sleep(3.0)
                memory.append(service.memory_info().rss)
        time.sleep(5.0)

    async def run(service: psutil.Process, client: httpx2.Client) -> list[Exchange]:
        moving = asyncio.create_task(asyncio.to_thread(move, service, client))
        history = await traffic(url, a_second=30, until=moving.done)
        await moving
        return history

    with (
        process("rag_assets", ["embedder", "--models", "hashing"], root=tmp_path, url=f"http://127.0.0.1:{embedder_port}", environ=environ),
        process("rag_assets", ["serve"], root=tmp_path, url=url, environ=environ) as service,
        httpx2.Client(base_url=url, trust_env=False, timeout=20) as client,
    ):
        assert client.post("/v1/query", json={"query": QUESTIONS[0]}).status_code == 200  # the first one loads what later ones share
        wall, monotonic = time.time(), time.monotonic()
        before = sum(service.cpu_times()[:2])
        history = asyncio.run(run(service, client))
        spent = sum(service.cpu_times()[:2]) - before
        time.sleep(3.0)
        memory.append(service.memory_info().rss)
    entries = Ledger(store).entries()
    promoted = [datetime.fromisoformat(entry.at).timestamp() - wall + monotonic for entry in entries if entry.action is Action.PROMOTE][1:]
    during = [exchange.milliseconds for exchange in history if any(at - 1 <= exchange.asked.sent <= at + 2 for at in promoted)]
    quiet = [exchange.milliseconds for exchange in history if not any(at - 1 <= exchange.asked.sent <= at + 3 for at in promoted)]
    with capsys.disabled():
        p99, p99_quiet = np.percentile(during, 99), np.percentile(quiet, 99)
        failed = dict(Counter(exchange.asked.code for exchange in history if exchange.asked.status != 200))
        print(
            f"\n{len(history)} requests, {len(promoted)} promotions, failed: {failed or 'none'}; "
            f"{spent / len(history) * 1000:.1f} ms of CPU a request, shadows and swaps included; "
            f"p50 {np.percentile(quiet, 50):.1f} ms, p99 {p99_quiet:.1f} ms, p99 around swaps {p99:.1f} ms ({p99 / p99_quiet:.2f}x); "
            f"followed after {np.median(lags):.2f} s, at most {max(lags):.2f} s; RSS {memory[0] / 1e6:.0f} -> {memory[1] / 1e6:.0f} MB"
        )
    assert len(promoted) == 22
    check_history(history, entries, texts)
    check_live_at_some_moment(history, entries, lag=max(lags) + 1.0, to_monotonic=monotonic - wall)
    assert memory[1] <= memory[0] * 1.1


def check_live_at_some_moment(history: Sequence[Exchange], entries: Sequence[Entry], *, lag: float, to_monotonic: float) -> None:
    """Each snapshot was live by the ledger between `lag` seconds before the request was sent and its reply; entries are dated to the second."""
    moves = [entry for entry in entries if entry.action in (Action.PROMOTE, Action.ROLLBACK)]
    begins = {entry.number: datetime.fromisoformat(entry.at).timestamp() + to_monotonic for entry in moves}
    ends = {entry.number: begins[after.number] + 1.0 for entry, after in pairwise(moves)}
    for exchange in history:
        assert begins[exchange.number] <= exchange.asked.received
        assert exchange.asked.sent - lag <= ends.get(exchange.number, float("inf"))
