"""The serving process over a real socket: replies, refusals, headers and readiness."""

import asyncio
import logging
import re
import subprocess
import sys
import time

import httpx2
import pytest
from live_server import running
from small_service import PAGES, SPEC, build, embedding, problem, release, serving, settings_for, two_snapshots
from starlette.exceptions import HTTPException

from rag_serving.deadline import Deadline
from rag_serving.edge.frame import Frame
from rag_serving.edge.origins import Origins
from rag_serving.edge.sending import due
from rag_serving.errors import NotReady
from rag_serving.signals import trace
from rag_serving.store import LocalStore

ASK = {"query": "How do I delete a bucket?"}
PHASES = ["admit", "encode", "retrieve", "assemble", "generate"]


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    """A client of a service with a released snapshot, and that snapshot's manifest."""
    root = tmp_path_factory.mktemp("app")
    store, manifest, _ = two_snapshots(root)
    release(store, manifest)
    with embedding(settings_for(root)) as url, serving(settings_for(root, embedder_url=url), store) as client:
        yield client, manifest


@pytest.fixture
def client(live):
    return live[0]


def test_retrieve(live):
    """/v1/retrieve gives ranked hits with their four signals, and names snapshot, release and model."""
    client, manifest = live
    reply = client.post("/v1/retrieve", json=ASK | {"top_k": 3})
    body = reply.json()
    assert reply.status_code == 200
    assert set(body) == {"snapshot_id", "release", "embedding_model", "hits", "degraded", "guards", "trace_id", "timings_ms"}
    assert (body["snapshot_id"], body["release"], body["embedding_model"], body["degraded"]) == (manifest.snapshot_id, 1, SPEC.name, [])
    assert [*body["timings_ms"]] == PHASES[:3]
    assert len(body["hits"]) == 3
    first = body["hits"][0]
    assert set(first) == {"chunk_id", "doc_id", "uri", "title", "heading_path", "text", "start", "end", "score", "signals"}
    assert (first["doc_id"], first["text"]) == ("s3.DeleteBucket", PAGES["s3.DeleteBucket"][1])
    assert {"dense_text", "dense_title", "bm25_text", "bm25_title"} <= set(first["signals"])
    assert [hit["score"] for hit in body["hits"]] == sorted((hit["score"] for hit in body["hits"]), reverse=True)


def test_query(client):
    """/v1/query quotes the passages word for word; each marker has a citation and each citation is a hit of the same reply."""
    body = client.post("/v1/query", json=ASK).json()
    assert [*body["timings_ms"]] == PHASES
    assert not body["abstained"]
    assert "All objects in the bucket must be deleted before the bucket itself can be deleted. [1]" in body["answer"]
    hits = {hit["chunk_id"]: hit for hit in body["hits"]}
    cited = {citation["number"]: hits[citation["chunk_id"]] for citation in body["citations"]}
    assert {int(number) for number in re.findall(r"\[(\d+)\]", body["answer"])} == set(cited)
    assert all(quote["text"] in cited[quote["number"]]["text"] for quote in body["quotes"])
    assert all(
        citation[key] == hits[citation["chunk_id"]][key] for citation in body["citations"] for key in ("doc_id", "uri", "start", "end")
    )


def test_query_abstains(client):
    """What the corpus does not speak of is not answered: 200, a plain sentence, no citations."""
    body = client.post("/v1/query", json={"query": "Who won the football world cup?"}).json()
    assert (body["abstained"], body["citations"], body["quotes"]) == (True, [], [])
    assert body["answer"].endswith(".")


def test_default_top_k(client):
    """Without top_k the configured number of passages comes back, at most as many as there are."""
    assert len(client.post("/v1/retrieve", json=ASK).json()["hits"]) == 5
    assert len(client.post("/v1/retrieve", json=ASK | {"top_k": 50}).json()["hits"]) == len(PAGES)


def test_unknown_address_and_method(client):
    """404 and 405 are problems too; 405 says what is allowed."""
    assert problem(client.get("/v1/nothing"))["code"] == "not_found"
    reply = client.get("/v1/query")
    assert (problem(reply)["code"], reply.headers["allow"]) == ("method_not_allowed", "POST")


def test_security_headers_everywhere(client):
    """Every reply, whatever its status, forbids foreign content, sniffing and framing."""
    for reply in (client.get("/"), client.get("/static/app.js"), client.get("/nothing"), client.post("/v1/query", content=b"x" * 70_000)):
        policy = reply.headers["content-security-policy"]
        assert "default-src 'self'" in policy
        assert "unsafe" not in policy
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert reply.headers["x-frame-options"] == "DENY"


def test_unforeseen_errors_are_problems():
    """What nobody foresaw is a 500 with a trace id and without its message."""

    async def broken(scope, receive, send):
        raise RuntimeError("secret /tmp/place")

    with running(Frame(broken, tracer=trace.tracer(trace.provider()), origins=Origins())) as url:
        reply = httpx2.get(url, trust_env=False)
    assert problem(reply)["code"] == "internal"
    assert "secret" not in reply.text


def test_a_status_that_is_not_ours_is_a_problem():
    """An error of the framework with a status that we have no words for is a 500 as any other fault, never a bare page."""

    async def teapot(scope, receive, send):
        raise HTTPException(418)

    with running(Frame(teapot, tracer=trace.tracer(trace.provider()), origins=Origins())) as url:
        reply = httpx2.get(url, trust_env=False)
    assert problem(reply)["code"] == "internal"
    assert "default-src" in reply.headers["content-security-policy"]


def test_who_does_not_read_a_refusal_has_left(caplog):
    """A client that takes nothing of a refusal is left alone a second after its deadline, as of any reply, and counts as gone."""
    outcomes = []

    async def refusing(scope, receive, send):
        due(scope, Deadline.after(-0.9))
        raise NotReady("no release is open.", fix="Wait.")

    async def stalled(message):
        outcomes.append(trace.current())
        await asyncio.sleep(60)

    async def asking():
        frame = Frame(refusing, tracer=trace.tracer(trace.provider()), origins=Origins())
        scope = {"type": "http", "method": "GET", "path": "/v1/release", "headers": [(b"host", b"localhost")]}
        await asyncio.wait_for(frame(scope, None, stalled), timeout=20)

    with caplog.at_level(logging.INFO, logger="rag_serving.edge.frame"):
        asyncio.run(asking())
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert outcomes[0].gone


@pytest.mark.parametrize(
    ("name", "media_type"),
    [("", "text/html"), ("static/app.css", "text/css"), ("static/app.js", "text/javascript"), ("static/icon.svg", "image/svg+xml")],
)
def test_page_files(client, name, media_type):
    """The page's files have their types, and are sent again only when they changed."""
    reply = client.get(f"/{name}")
    assert reply.status_code == 200
    assert reply.headers["content-type"].split(";")[0] == media_type
    assert reply.headers["cache-control"] == "no-cache"
    assert client.get(f"/{name}", headers={"If-None-Match": reply.headers["etag"]}).status_code == 304


def test_release(live):
    """/v1/release names the champion with its size, what is open, and the ledger's last entries."""
    client, manifest = live
    body = client.get("/v1/release").json()
    assert (body["number"], body["previous"], body["holds"], body["problem"]) == (1, None, [], None)
    champion = body["champion"]
    assert (champion["snapshot_id"], champion["manifest_sha256"]) == (manifest.snapshot_id, manifest.sha256)
    assert (champion["documents"], champion["rows"], champion["embedding_model"]) == (5, 5, SPEC.name)
    assert (body["open"]["snapshot_id"], body["open"]["release"]) == (manifest.snapshot_id, 1)
    (entry,) = body["history"]
    assert (entry["number"], entry["action"], entry["actor"], entry["reason"]) == (1, "promote", "tester", "for a test")


def test_no_vectors_in_replies(live):
    """No field of any reply holds an embedding."""
    client, manifest = live
    replies = [client.post(path, json=ASK).json() for path in ("/v1/retrieve", "/v1/query")] + [client.get("/v1/release").json()]

    def longest_number_list(value) -> int:
        if isinstance(value, dict):
            return max((longest_number_list(each) for each in value.values()), default=0)
        if isinstance(value, list):
            numbers = sum(isinstance(each, int | float) for each in value)
            return max([numbers, *(longest_number_list(each) for each in value)])
        return 0

    assert max(longest_number_list(reply) for reply in replies) < manifest.dims


def test_degraded_without_embedder(tmp_path):
    """When the embedding service goes away, answers come from full-text search alone and say so; when it is back, they are whole."""
    store, manifest, _ = two_snapshots(tmp_path)
    release(store, manifest)
    with embedding(settings_for(tmp_path)) as url:
        port = int(url.rpartition(":")[2])
    with serving(settings_for(tmp_path, embedder_url=url), store) as client:
        body = client.post("/v1/query", json=ASK).json()
        assert body["degraded"] == ["embedding"]
        assert not {"dense_text", "dense_title"} & set(body["hits"][0]["signals"])
        assert body["citations"][0]["doc_id"] == "s3.DeleteBucket"
        assert client.get("/readyz").status_code == 200
        from rag_serving import embedder

        with running(embedder.create_app(settings_for(tmp_path), preload=[SPEC.name]), ready_path="/readyz", port=port):
            assert client.post("/v1/query", json=ASK).json()["degraded"] == []


def test_another_model_is_never_searched_with(tmp_path):
    """An embedding service whose fingerprint is not the snapshot's gives 503 model_mismatch with the remedy, and no hits."""
    store, manifest, _ = two_snapshots(tmp_path)
    release(store, manifest)
    other = SPEC.model_copy(update={"query_prompt": "query: "})
    with embedding(settings_for(tmp_path, spec=other)) as url, serving(settings_for(tmp_path, embedder_url=url), store) as client:
        reply = client.post("/v1/query", json=ASK)
        assert problem(reply)["code"] == "model_mismatch"
        assert reply.headers["retry-after"]
        assert "embedder" in reply.json()["fix"]


def test_nothing_released_yet(tmp_path):
    """An empty store: alive, not ready, and every question is told what to run."""
    with serving(settings_for(tmp_path), LocalStore(tmp_path / "none"), ready=False) as client:
        assert client.get("/livez").status_code == 200
        deadline = time.monotonic() + 5
        while "promoted" not in (reply := client.get("/readyz")).json()["detail"]:
            assert time.monotonic() < deadline, reply.text
        found = problem(client.post("/v1/query", json=ASK))
        assert found["code"] == "not_ready"
        assert "ragline run" in found["fix"]
        body = client.get("/v1/release").json()
        assert (body["champion"], body["open"], body["history"], body["problem"]) == (None, None, [], None)


def test_first_release_is_picked_up(tmp_path):
    """A service that started before anything was promoted becomes ready by itself."""
    store, manifest, _ = two_snapshots(tmp_path)
    with serving(settings_for(tmp_path), store, ready=False) as client:
        assert client.get("/readyz").status_code == 503
        release(store, manifest)
        deadline = time.monotonic() + 10
        while client.get("/readyz").status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert client.post("/v1/retrieve", json=ASK).json()["release"] == 1


def test_serving_is_light():
    """Importing the service brings neither torch nor the pipeline's packages."""
    heavy = ["torch", "dagster", "mlflow", "pandas", "sentence_transformers", "lancedb", "rag_assets"]
    code = f"import sys, rag_serving.app; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_questions_at_once_are_not_mixed_up(tmp_path):
    """Fifty questions at the same moment, encoded together, get the answers that each gets alone."""
    store = LocalStore(tmp_path / "store")
    pages = {f"page.{number}": (f"Page {number}", f"The word of this page is zebra{number}.") for number in range(50)}
    release(store, build(store, settings_for(tmp_path), pages))
    queries = [{"query": f"zebra{number}", "top_k": 3} for number in range(50)]

    async def ask_all(url: str) -> tuple[list[httpx2.Response], list[httpx2.Response]]:
        async with httpx2.AsyncClient(base_url=url, trust_env=False, timeout=90) as client:
            alone = [await client.post("/v1/retrieve", json=query) for query in queries]
            return alone, await asyncio.gather(*(client.post("/v1/retrieve", json=query) for query in queries))

    with (
        embedding(settings_for(tmp_path)) as url,
        serving(settings_for(tmp_path, embedder_url=url, encode_timeout_seconds=60), store) as client,
    ):
        alone, together = asyncio.run(ask_all(str(client.base_url)))
    assert not any(reply.json()["degraded"] for reply in (*alone, *together))
    assert [reply.json()["hits"] for reply in alone] == [reply.json()["hits"] for reply in together]
