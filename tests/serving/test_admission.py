"""The edge over HTTP: the order of its checks, deadlines of a request's own, room for work, names and origins, and requests sent twice."""

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx2
import pytest
from fastapi import Depends, FastAPI
from live_server import running
from opentelemetry.sdk.trace import TracerProvider
from small_service import release, serving, settings_for, two_snapshots
from starlette.responses import JSONResponse

from rag_serving.admission import Question, clean_text
from rag_serving.edge.entry import Asked, Door, Edge, Entry, doors
from rag_serving.edge.frame import Frame
from rag_serving.edge.keys import create_key
from rag_serving.edge.origins import Origins
from rag_serving.errors import QueryError
from rag_serving.feedback import waiting_queries
from rag_serving.settings import Access, Admission
from rag_serving.store import LocalStore

ASK = {"query": "How do I delete a bucket?"}
JSON = {"Content-Type": "application/json"}


class Gate:
    """An embedding service that answers nothing until it is opened; `entered` counts the requests that reached it, `bodies` has them."""

    def __init__(self) -> None:
        self.entered = threading.Semaphore(0)
        self.opened = threading.Event()
        self.bodies: list[bytes] = []

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "http":
            self.bodies.append((await receive()).get("body", b""))
            self.entered.release()
            await asyncio.to_thread(self.opened.wait, 30)
        await JSONResponse({}, status_code=503)(scope, receive, send)


@contextmanager
def gated(root, *, access: Access | None = None, admission: Admission | None = None) -> Iterator[tuple[httpx2.Client, Gate, object]]:
    """A service whose questions stand still in `encode` until the gate opens."""
    store, manifest, _ = two_snapshots(root)
    release(store, manifest)
    gate = Gate()
    with running(gate) as url:
        settings = settings_for(root, embedder_url=url, encode_timeout_seconds=50)
        settings = settings.model_copy(update={"access": access or Access(), "admission": admission or Admission()})
        with serving(settings, store) as client:
            try:
                yield client, gate, store
            finally:
                gate.opened.set()


def test_the_order_at_the_edge(tmp_path):
    """Size, key, rate, body, room: a request that is wrong in every way is refused for the first, and so on as each is put right."""
    with (
        gated(
            tmp_path, access=Access(requests_per_minute=3, burst_seconds=0, poll_seconds=0.05), admission=Admission(concurrency=1, queue=0)
        ) as (
            client,
            gate,
            store,
        ),
        ThreadPoolExecutor(1) as pool,
    ):
        keys = [{"Authorization": f"Bearer {create_key(store, name, scopes=('query',), actor='tester')[0]}"} for name in ("a", "b")]
        while client.post("/v1/query", content=b"{").status_code != 401:  # until the first key counts
            time.sleep(0.01)
        under_way = pool.submit(client.post, "/v1/query", json=ASK, headers=keys[1])
        assert gate.entered.acquire(timeout=20)

        def code(content: bytes, headers: dict[str, str]) -> tuple[int, str]:
            reply = client.post("/v1/query", content=content, headers=headers)
            return reply.status_code, reply.json()["code"]

        assert code(b"{" * 70_000, {}) == (413, "body_too_long")
        assert code(b"{", {}) == (401, "unauthorized")
        assert code(b"{", keys[0]) == (415, "unsupported_media_type")
        assert code(b"{", keys[0] | JSON) == (400, "invalid_json")
        assert code(b'{"query": "a"}', keys[0] | JSON) == (503, "overloaded")
        assert code(b"{", keys[0]) == (429, "rate_limited")
        gate.opened.set()
        assert under_way.result().status_code == 200


def test_more_than_there_is_room_for(tmp_path):
    """With one slot and one place to wait, the third question is told to come back; probes and the page answer; then all goes on."""
    with gated(tmp_path, admission=Admission(concurrency=1, queue=1)) as (client, gate, _), ThreadPoolExecutor(8) as pool:
        first = pool.submit(client.post, "/v1/query", json=ASK)
        assert gate.entered.acquire(timeout=20)
        others = [pool.submit(client.post, "/v1/query", json=ASK) for _ in range(6)]
        refused = []
        while len(refused) < 5:
            refused = [each.result() for each in others if each.done()]
        assert all(reply.status_code == 503 for reply in refused)
        assert all(reply.json()["code"] == "overloaded" and int(reply.headers["retry-after"]) >= 1 for reply in refused)
        assert [client.get(path).status_code for path in ("/livez", "/readyz", "/", "/v1/release")] == [200] * 4
        gate.opened.set()
        assert first.result().status_code == 200
        assert sorted(each.result().status_code for each in others) == [200] + [503] * 5
        assert client.post("/v1/query", json=ASK).status_code == 200


def test_a_client_that_left_is_not_worked_for(tmp_path):
    """A question whose client hung up while it waited takes no slot's time: nothing is encoded for it."""
    with gated(tmp_path, admission=Admission(concurrency=1, queue=5)) as (client, gate, _), ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.post, "/v1/query", json=ASK)
        assert gate.entered.acquire(timeout=20)
        with pytest.raises(httpx2.ReadTimeout):
            httpx2.post(f"{client.base_url}/v1/query", json={"query": "who waits in vain"}, timeout=0.5, trust_env=False)
        gate.opened.set()
        assert first.result().status_code == 200
        assert client.post("/v1/query", json={"query": "who comes after"}).status_code == 200
        assert [text for text in (b"who comes after", b"who waits in vain") if any(text in body for body in gate.bodies)] == [
            b"who comes after"
        ]


def test_a_request_may_ask_for_less_time(tmp_path):
    """`deadline_ms` shortens the time of a request and never lengthens it; a request whose time ends is refused as such."""
    app, tracer = FastAPI(), TracerProvider().get_tracer("test")

    @app.post("/left")
    async def left(admitted: Asked[Question] = Depends(Door("query", Question))) -> float:  # noqa: B008, FAST002
        return admitted.exchange.deadline.remaining

    edge = Edge(settings_for(tmp_path), LocalStore(tmp_path))
    edge.keys.refresh()
    app.add_middleware(Entry, edge=edge, tracer=tracer, doors=doors(app.router))
    app.add_middleware(Frame, tracer=tracer, origins=Origins())
    with running(app) as url:
        remaining = [
            httpx2.post(f"{url}/left", json=ASK | more, trust_env=False).json()
            for more in ({}, {"deadline_ms": 900}, {"deadline_ms": 60_000})
        ]
    assert 0 < remaining[1] <= 0.9
    assert all(30 < seconds <= 60 for seconds in (remaining[0], remaining[2]))


def test_time_that_ends_is_told(tmp_path):
    """A question with 100 ms that the embedding service keeps waiting is answered without it, or refused as out of time; never a 500."""
    with gated(tmp_path) as (client, _, _):
        reply = client.post("/v1/query", json=ASK | {"deadline_ms": 100})
        assert (reply.status_code, reply.json().get("degraded", reply.json().get("code"))) in (
            (200, ["embedding"]),
            (504, "deadline_exceeded"),
            (503, "overloaded"),
        )


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    """A client of an open service that is also known as rag.example.org."""
    root = tmp_path_factory.mktemp("edge")
    store, manifest, _ = two_snapshots(root)
    release(store, manifest)
    settings = settings_for(root).model_copy(update={"access": Access(allowed_hosts=("rag.example.org",))})
    with serving(settings, store) as client:
        client.store = store
        yield client


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:8321", "127.0.0.1:1", "[::1]:8321", "10.1.2.3", "rag.example.org", "RAG.example.org:443"]
)
def test_own_names(client, host):
    """Plain addresses, localhost and the configured names are the service's, with any port."""
    assert client.get("/livez", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "rag.example.org.evil.example", "127.0.0.1.evil.example", "", "a b", "[::1", "@localhost@evil"]
)
def test_foreign_names(client, host):
    """Any other Host is refused on every address, so that a name which was made to point here gets nothing."""
    for path in ("/livez", "/", "/v1/release"):
        reply = client.get(path, headers={"Host": host})
        assert (reply.status_code, reply.json()["code"]) == (400, "unknown_host")
    assert "evil" not in reply.text


def test_other_sites_cannot_ask(client):
    """A POST that a page of another origin sends is refused; the service's own page, a named host's page and programs may."""
    own = str(client.base_url)
    for origin in ("https://evil.example", "null", "http://127.0.0.1:1", "http://localhost", "file://", "http://[", own + ".evil.example"):
        reply = client.post("/v1/query", json=ASK, headers={"Origin": origin})
        assert (reply.status_code, reply.json()["code"]) == (403, "cross_origin"), origin
    for headers in ({}, {"Origin": own}, {"Origin": "https://rag.example.org"}):
        assert client.post("/v1/query", json=ASK, headers=headers).status_code == 200
    reply = client.get("/v1/release", headers={"Origin": "https://evil.example"})
    assert not [name for name in reply.headers if name.startswith("access-control-")]


THUMB = {"query": "Which key encrypts it?", "verdict": "up", "snapshot_id": "some-snapshot-1"}


def test_sent_twice_is_done_once(client):
    """The same body under the same Idempotency-Key gives the first reply, trace id included, and queues nothing twice."""
    body = THUMB | {"query": "sent twice"}
    first, second = (client.post("/v1/feedback", json=body, headers={"Idempotency-Key": "one"}) for _ in range(2))
    assert (first.status_code, second.status_code) == (202, 202)
    assert first.json() == second.json()
    assert first.json()["queued"]
    assert ("idempotent-replayed" in first.headers, second.headers["idempotent-replayed"]) == (False, "true")
    assert [each.query for each in waiting_queries(client.store)].count("sent twice") == 1


def test_sent_at_once_is_done_once(client):
    """Twenty copies at the same moment do the work once: all get the same reply."""
    body = THUMB | {"query": "sent at once"}
    with ThreadPoolExecutor(20) as pool:
        replies = [*pool.map(lambda _: client.post("/v1/feedback", json=body, headers={"Idempotency-Key": "many"}), range(20))]
    assert {reply.status_code for reply in replies} == {202}
    assert len({reply.json()["trace_id"] for reply in replies}) == 1


def test_a_key_used_for_another_body(client):
    """An Idempotency-Key that came with another body is a conflict, and nothing is done; another caller's same key would be another."""
    headers = {"Idempotency-Key": "two"}
    assert client.post("/v1/feedback", json=THUMB | {"query": "first body"}, headers=headers).status_code == 202
    reply = client.post("/v1/feedback", json=THUMB | {"query": "second body"}, headers=headers)
    assert (reply.status_code, reply.json()["code"]) == (409, "idempotency_conflict")
    assert "second body" not in [each.query for each in waiting_queries(client.store)]


def test_work_that_failed_may_be_tried_again(client):
    """A refused body leaves its key unused; a malformed key is refused."""
    headers = {"Idempotency-Key": "three"}
    assert client.post("/v1/feedback", json=THUMB | {"query": ""}, headers=headers).status_code == 422
    assert client.post("/v1/feedback", json=THUMB | {"query": "put right"}, headers=headers).status_code == 202
    for bad in ("", "a b", "x" * 129, "ü".encode()):
        reply = client.post("/v1/feedback", json=THUMB, headers={"Idempotency-Key": bad})
        assert (reply.status_code, reply.json()["code"]) == (422, "invalid_field")


def test_a_question_is_clean_however_it_is_made():
    """Wherever a Question comes from, its text is NFC, has something to read in it, and is no longer than allowed."""
    assert Question(query="cafe\u0301").query == "caf\u00e9"
    for bad in ("", "\u200b", "a\u0000", "x" * 4001, "x" * 100_000, "a" + "\u0301" * 31):
        with pytest.raises(QueryError):
            Question(query=bad)
        with pytest.raises(QueryError):
            clean_text(bad)
