"""What the embedding service computes beside vectors: in turns of the same threads, so that nothing computes at the same time as queries do."""

import asyncio
import dataclasses
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest
from live_server import running
from small_service import SPEC

from rag_serving import embedder
from rag_serving.deadline import Deadline
from rag_serving.embedding.batching import Bench
from rag_serving.embedding.turns import MOST_WAITING, Overloaded
from rag_serving.errors import DeadlineExceeded
from rag_serving.models import load_model
from rag_serving.settings import Settings

MODEL = load_model(SPEC, Path())
LATER = Deadline.after(3600)


@pytest.fixture(autouse=True)
def one_core(monkeypatch):
    """One thread for queries, one for documents."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


class Gate:
    """A model whose every batch waits until the gate is open; `seen` are the batches in order."""

    def __init__(self) -> None:
        self.open, self.entered = threading.Event(), threading.Event()
        self.seen: list[list[str]] = []
        self.model = dataclasses.replace(MODEL, raw=self._raw, packed=None)

    def _raw(self, texts):
        self.entered.set()
        assert self.open.wait(30)
        self.seen.append(list(texts))
        return MODEL.raw(texts)


def worked(work) -> object:
    """What `await work(bench, gate)` gives; the bench is started before and closed after."""

    async def run():
        bench, gate = Bench(max_wait=0.0, batch_tokens=16), Gate()
        bench.start()
        try:
            return await work(bench, gate)
        finally:
            gate.open.set()
            await asyncio.to_thread(bench.close)

    return asyncio.run(run())


def test_turns_come_in_the_order_of_arrival():
    """Among queries other work is done when it is its turn: after what came before, and before what came later."""
    order: list[str] = []

    async def work(bench, gate):
        first = bench.submit(gate.model, ["first"], query=True)
        await asyncio.to_thread(gate.entered.wait)
        second = asyncio.ensure_future(bench.turn(lambda: order.append("turn") or gate.seen.copy(), query=True, deadline=LATER))
        await asyncio.sleep(0.01)
        third = bench.submit(gate.model, ["third"], query=True)
        await asyncio.sleep(0.05)
        assert order == []  # nothing is computed beside
        gate.open.set()
        await asyncio.gather(first, third)
        return await second

    assert worked(work) == [["first"]]
    assert order == ["turn"]


def test_larger_work_and_documents_take_turns():
    """Between two pieces of documents one other piece of work is done, and documents go on however much of it waits."""

    async def work(bench, gate):
        documents = bench.submit(gate.model, ["one", "two"], query=False)  # a piece each, as long as no pace is known
        await asyncio.to_thread(gate.entered.wait)
        turns = [asyncio.ensure_future(bench.turn(lambda: len(gate.seen), query=False, deadline=LATER)) for _ in range(3)]
        await asyncio.sleep(0.01)
        gate.open.set()
        await documents
        return [await turn for turn in turns]

    assert worked(work) == [1, 2, 2]


def test_what_goes_wrong_is_told():
    """An error of the work is its caller's, a deadline that passed before its turn is DeadlineExceeded, and too many waiting are refused."""

    async def work(bench, gate):
        with pytest.raises(ZeroDivisionError):
            await bench.turn(lambda: 1 // 0, query=True, deadline=LATER)
        blocked = bench.submit(gate.model, ["blocked"], query=True)
        await asyncio.to_thread(gate.entered.wait)
        late = asyncio.ensure_future(bench.turn(lambda: None, query=True, deadline=Deadline.after(0.01)))
        waiting = [asyncio.ensure_future(bench.turn(lambda: None, query=True, deadline=LATER)) for _ in range(MOST_WAITING - 1)]
        await asyncio.sleep(0.05)
        one_more = asyncio.ensure_future(bench.turn(lambda: "done", query=True, deadline=LATER))  # in the place of the one that is late
        await asyncio.sleep(0.01)
        with pytest.raises(Overloaded):
            await bench.turn(lambda: None, query=True, deadline=LATER)
        with pytest.raises(DeadlineExceeded):
            await late
        waiting[0].cancel()
        gate.open.set()
        await blocked
        assert await one_more == "done"
        assert len(await asyncio.gather(*waiting, return_exceptions=True)) == MOST_WAITING - 1

    worked(work)


def test_idle_tells_when_a_model_last_worked():
    """Infinite before its first vector, then the seconds since the last one; a failed batch changes nothing."""

    async def work(bench, gate):
        gate.open.set()
        assert bench.idle(gate.model) == float("inf")
        await bench.encode(gate.model, ["a"], query=True)
        before = bench.idle(gate.model)
        with pytest.raises(ZeroDivisionError):
            await bench.encode(dataclasses.replace(MODEL, raw=lambda _: 1 // 0, packed=None), ["a"], query=True)
        assert 0 <= before <= bench.idle(gate.model) < 30

    worked(work)


@contextmanager
def service(gate: Gate):
    """An embedding service whose model waits at the gate, once it is loaded; and a client."""
    made = embedder.create_app(Settings(root=Path(), models=(SPEC,)), preload=[SPEC.name])
    with running(made, ready_path="/readyz") as url, httpx2.Client(base_url=url, trust_env=False, timeout=30) as client:
        made.state.shelf.loaded[SPEC.name] = gate.model
        try:
            yield made, client
        finally:
            gate.open.set()


def test_readiness_does_not_wait_in_line(monkeypatch):
    """With many queries waiting /readyz really embeds before all of them; and while vectors were made a moment ago it does not embed."""
    gate, asked = Gate(), {"model": SPEC.name, "input": [f"number {at}" for at in range(200)], "input_type": "query"}
    with service(gate) as (made, client), ThreadPoolExecutor() as threads:
        monkeypatch.setattr(embedder, "FRESH_SECONDS", 3600.0)
        assert client.get("/readyz").status_code == 200  # by the text of a moment ago
        assert gate.seen == []
        monkeypatch.setattr(embedder, "FRESH_SECONDS", -1.0)
        waiting = threads.submit(client.post, "/v1/embeddings", json=asked)
        assert gate.entered.wait(20)
        ready = threads.submit(client.get, "/readyz")
        while not any("ready?" in text for work in tuple(made.state.bench._lines[True]) for text in work.texts):
            time.sleep(0.01)
        assert not ready.done()
        gate.open.set()
        assert ready.result().json() == {"status": "ready", "models": {SPEC.name: "ready"}}
        assert waiting.result().status_code == 200
        (at,) = (at for at, batch in enumerate(gate.seen) if any("ready?" in text for text in batch))
        assert at == 1
        assert len(gate.seen) > 2
        assert made.state.bench.idle(gate.model) < 30


def test_token_vectors_wait_for_queries():
    """Token vectors of a query are not computed beside a batch of queries: they come when that is done."""
    gate = Gate()
    with service(gate) as (_, client), ThreadPoolExecutor() as threads:
        first = threads.submit(client.post, "/v1/embeddings", json={"model": SPEC.name, "input": ["a"], "input_type": "query"})
        assert gate.entered.wait(20)
        tokens = threads.submit(client.post, "/v1/token_embeddings", json={"model": SPEC.name, "input": ["delete buckets"]})
        time.sleep(0.2)
        assert not tokens.done()
        gate.open.set()
        assert tokens.result().json()["data"][0]["tokens"] == 2
        assert first.result().status_code == 200


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/token_embeddings", "/v1/rerank"])
@pytest.mark.parametrize("declared", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_only_json_is_read(path, declared):
    """A body that is not declared as JSON is 415 and is not parsed, at every route that takes one."""
    gate = Gate()
    with service(gate) as (_, client):
        headers = {"Content-Type": declared} if declared else {}
        reply = client.post(path, content=b'{"model": "hashing", "input": ["a"]}', headers=headers)
    assert reply.status_code == 415
    assert "application/json" in reply.json()["error"]["message"]
