"""The embedding service fails in every way over real sockets: questions are answered by words meanwhile, and in full soon after it heals."""

import asyncio
import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import numpy as np
import pytest
from live_server import running
from small_service import SPEC, build, problem, release, serving, settings_for
from spoiled_service import FAULTS, LIES, Lies

from rag_serving.embedder import create_app
from rag_serving.embedding.remote_encoder import RemoteEncoder
from rag_serving.encoding import Vectors
from rag_serving.errors import EncoderError, EncoderUnavailable
from rag_serving.models import load_model
from rag_serving.settings import EncoderClient, Settings
from rag_serving.store import LocalStore
from rag_serving.tcp_faults import HEALTHY, Fault, TcpFaults

QUESTION = "How do I delete a bucket?"
PATIENCE = 0.4  # seconds for the embedding service
OPEN = 0.5  # seconds that the breaker stays open


class Place:
    """A serving process, and the embedding service behind a proxy that spoils what passes."""

    def __init__(self, client: httpx2.Client, faults: TcpFaults, lies: Lies) -> None:
        self.client, self.faults, self.lies = client, faults, lies

    def ask(self) -> httpx2.Response:
        return self.client.post("/v1/retrieve", json={"query": QUESTION})

    def heal(self) -> None:
        self.faults.set(HEALTHY)
        self.lies.spoil = self.lies.status = None

    def until_whole(self) -> float:
        """Ask until an answer is not degraded; the seconds it took."""
        before = time.monotonic()
        while (reply := self.ask()).status_code != 200 or reply.json()["degraded"]:
            assert time.monotonic() - before < 60, reply.text
            time.sleep(0.05)
        return time.monotonic() - before


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("place")
    store = LocalStore(root / "store")
    release(store, build(store, settings_for(root)))
    lies = Lies(create_app(settings_for(root), preload=[SPEC.name]))
    with running(lies, ready_path="/readyz") as url, TcpFaults(url) as faults:
        settings = settings_for(root, embedder_url=faults.url, encode_timeout_seconds=PATIENCE)
        settings = settings.model_copy(update={"encoder": EncoderClient(cache_entries=0, breaker_open_seconds=OPEN)})
        with serving(settings, store) as client:
            yield Place(client, faults, lies)


@pytest.fixture(autouse=True)
def healed(place):
    place.heal()
    place.until_whole()
    yield
    place.heal()


@pytest.mark.parametrize("name", FAULTS)
def test_connection_faults_degrade_to_words(place, name):
    """Every question is answered from the full text, and says so; soon after the service heals, answers are whole again."""
    place.faults.set(FAULTS[name])
    for _ in range(8):
        reply = place.ask()
        assert reply.status_code == 200, reply.text
        assert reply.json()["degraded"] == ["embedding"]
        assert reply.json()["hits"][0]["doc_id"] == "s3.DeleteBucket"
    asked = place.faults.replies + place.faults.accepted
    assert place.ask().json()["degraded"] == ["embedding"]
    place.heal()
    place.until_whole()
    assert place.faults.replies + place.faults.accepted > asked


def test_an_open_breaker_leaves_the_service_alone(place):
    """After five failures questions do not wait for it any more, and nothing reaches it until the pause is over."""
    place.faults.set(FAULTS["silent"])
    for _ in range(5):
        place.ask()
    connections = place.faults.accepted
    encode = [place.ask().json()["timings_ms"]["encode"] for _ in range(3)]
    assert min(encode) < PATIENCE * 1000 / 2
    assert place.faults.accepted <= connections + 1


@pytest.mark.parametrize("name", LIES)
def test_unusable_vectors_degrade_to_words(place, name):
    """NaN, a wrong dimension, a zero vector and a reply without vectors are never searched: words alone answer."""
    place.lies.spoil = LIES[name]
    for _ in range(7):
        reply = place.ask()
        assert (reply.status_code, reply.json()["degraded"]) == (200, ["embedding"])
    place.heal()
    place.until_whole()


@pytest.mark.parametrize("status", [429, 500, 503])
def test_error_statuses_degrade_to_words(place, status):
    """An overloaded or failing service is done without."""
    place.lies.status = status
    for _ in range(7):
        assert place.ask().json()["degraded"] == ["embedding"]
    place.heal()
    place.until_whole()


def test_another_model_is_refused(place):
    """A service with another fingerprint is never searched with: 503 model_mismatch for as long as it lasts, and whole answers after."""
    place.lies.spoil = lambda body: body.update(fingerprint="0" * 64)
    for _ in range(7):
        reply = place.ask()
        assert (reply.status_code, problem(reply)["code"]) == (503, "model_mismatch")
    place.heal()
    assert place.ask().json()["degraded"] == []


def test_a_stopped_service_piles_nothing_up(place):
    """While it is silent many ask at once; when it goes on, the work that nobody waits for any more is dropped and the next is prompt."""
    place.faults.set(FAULTS["silent"])
    with ThreadPoolExecutor(max_workers=12) as threads:
        replies = [reply.result() for reply in [threads.submit(place.ask) for _ in range(24)]]
    assert {(reply.status_code, *reply.json()["degraded"]) for reply in replies} == {(200, "embedding")}
    place.heal()
    place.until_whole()


# the client's own pool


@contextlib.contextmanager
def embedding_behind_faults():
    with (
        running(create_app(Settings(root=Path(), models=(SPEC,)), preload=[SPEC.name]), ready_path="/readyz") as url,
        TcpFaults(url) as faults,
    ):
        yield faults


async def cancelled(encoder: RemoteEncoder, *, times: int, together: int) -> None:
    """Begin `times` calls, `together` at a time, and cancel each at a moment of its own: while connecting, sending or waiting."""
    for start in range(0, times, together):
        calls = [asyncio.create_task(encoder.encode([f"query {number}"])) for number in range(start, start + together)]
        for number, call in enumerate(calls):
            await asyncio.sleep(0.0002 * (number % 7))
            call.cancel()
        for result in await asyncio.gather(*calls, return_exceptions=True):
            assert result is None or isinstance(result, (asyncio.CancelledError, np.ndarray, EncoderError)), result


def survive_cancels(times: int) -> int:
    """How many of 50 ordinary calls get their vectors after `times` cancelled ones, half of them before a silent service."""
    model = load_model(SPEC, Path())

    async def run(faults: TcpFaults) -> int:
        client = EncoderClient(cache_entries=0)
        encoder = RemoteEncoder(faults.url, SPEC.name, model.fingerprint, dims=model.dims, timeout_seconds=20, client=client)
        await cancelled(encoder, times=times // 2, together=50)
        await asyncio.to_thread(faults.set, Fault("blackhole"))
        await cancelled(encoder, times=times // 2, together=50)
        await asyncio.to_thread(faults.set, HEALTHY)
        assert encoder.state == "closed"
        assert encoder.traffic.in_flight == 0
        queries = [f"after {number}" for number in range(50)]
        rows: list[Vectors] = await asyncio.gather(*(encoder.encode([query]) for query in queries))
        np.testing.assert_allclose(np.concatenate(rows), model.encode_queries(queries), atol=1e-6)
        await encoder.aclose()
        return len(rows)

    with embedding_behind_faults() as faults:
        return asyncio.run(run(faults))


def test_cancelled_calls_do_not_use_up_the_pool():
    """After 400 calls cancelled in every state, during connecting too, 50 of 50 ordinary ones get their vectors."""
    assert survive_cancels(400) == 50


@pytest.mark.heavy
@pytest.mark.timeout(900)
def test_ten_thousand_cancels():
    """The same after 10,000."""
    started = time.monotonic()
    assert survive_cancels(10_000) == 50
    print(f"10,000 cancelled calls, then 50/50, in {time.monotonic() - started:.0f} s")


@pytest.mark.heavy
@pytest.mark.timeout(600)
def test_hedging_cuts_the_tail():
    """With one reply in 25 1 s late, hedging after the rolling p95 halves the p99 or better, for at most 5 % more requests."""
    model = load_model(SPEC, Path())

    async def p99(faults: TcpFaults, share: float) -> tuple[float, RemoteEncoder]:
        client = EncoderClient(cache_entries=0, hedge_share=share)
        encoder = RemoteEncoder(faults.url, SPEC.name, model.fingerprint, dims=model.dims, timeout_seconds=5, client=client)
        seconds = []
        for number in range(400):
            before = time.monotonic()
            await encoder.encode([f"query {number}"])
            seconds.append(time.monotonic() - before)
        await encoder.aclose()
        return float(np.percentile(seconds, 99)), encoder

    with embedding_behind_faults() as faults:
        faults.set(Fault("latency", seconds=1.0, every=25))
        plain, _ = asyncio.run(p99(faults, 0.0))
        hedged, encoder = asyncio.run(p99(faults, 0.05))
    extra = encoder.traffic.hedges / encoder.traffic.requests
    print(f"p99 {plain * 1000:.0f} ms, hedged {hedged * 1000:.0f} ms, {extra:.1%} more requests")
    assert hedged <= plain / 2
    assert extra <= 0.0525


@pytest.mark.heavy
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", FAULTS)
def test_every_question_is_answered_in_time(place, name):
    """At 20 questions a second for 10 s of a fault: all answered, P99 within 3 s, and whole answers within 10 s of healing."""
    place.faults.set(FAULTS[name])
    seconds: list[float] = []
    statuses: list[int] = []
    lock = threading.Lock()

    def one() -> None:
        before = time.monotonic()
        reply = place.ask()
        with lock:
            seconds.append(time.monotonic() - before)
            statuses.append(reply.status_code)

    with ThreadPoolExecutor(max_workers=64) as threads:
        for _ in range(200):
            threads.submit(one)
            time.sleep(0.05)
    place.heal()
    recovery = place.until_whole()
    p99 = float(np.percentile(seconds, 99))
    print(
        f"{name}: {len(statuses)} answers, P50 {np.median(seconds) * 1000:.0f} ms, P99 {p99 * 1000:.0f} ms, whole again after {recovery:.1f} s"
    )
    assert set(statuses) == {200}
    assert len(statuses) == 200
    assert p99 <= 3
    assert recovery <= 10


def test_an_open_breaker_says_so():
    """A refused call names the service and says when it is asked again."""
    encoder = RemoteEncoder("http://127.0.0.1:9", SPEC.name, "f", dims=64, timeout_seconds=1)

    async def run() -> None:
        for _ in range(5):
            with pytest.raises(EncoderUnavailable, match="cannot be reached"):
                await encoder.encode(["x"])
        with pytest.raises(EncoderUnavailable, match=r"asked again in \d"):
            await encoder.encode(["x"])
        await encoder.aclose()

    asyncio.run(run())
