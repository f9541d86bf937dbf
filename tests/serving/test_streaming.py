"""Answers as Server-Sent Events: the same content as without, as it becomes certain; and work that ends when its client leaves."""

import json
import socket
import threading
import time

import httpx2
import pytest
from scripted_model import answering, scripted, with_model
from small_service import build, embedding, release, serving, settings_for

from rag_serving.errors import RaglineError
from rag_serving.store import LocalStore
from rag_serving.writing.relevance import SIGNAL, threshold_key

ASK = {"query": "How do I delete a bucket?"}
VOLATILE = ("trace_id", "timings_ms")


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    root = tmp_path_factory.mktemp("streaming")
    store = LocalStore(root)
    return root, store, release(store, build(store, settings_for(root)))


@pytest.fixture(scope="module")
def service(released):
    """A service with a scripted model, and the model's script."""
    with scripted() as (url, script), answering(released[0], released[1], url, llm_timeout_seconds=1.0) as client:
        yield client, script


def events(response: httpx2.Response) -> list[tuple[str, object]]:
    """Name and data of each event."""
    found = []
    for block in response.text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if fields:
            found.append((fields["event"], json.loads(fields["data"])))
    return found


def eventually(holds) -> None:
    """Wait until `holds()`, for as long as a busy machine may take."""
    for _ in range(3000):
        if holds():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen")


def stable(reply: dict) -> dict:
    return {name: value for name, value in reply.items() if name not in VOLATILE}


@pytest.mark.parametrize("way", ["field", "header"])
def test_events_come_in_order(service, way):
    """Hits, the answer's text, its citations, and the whole reply; asked for in the body or by Accept."""
    client, script = service
    script.mode = "quote"
    if way == "field":
        response = client.post("/v1/query", json={**ASK, "stream": True})
    else:
        response = client.post("/v1/query", json=ASK, headers={"Accept": "text/event-stream"})
    assert response.headers["content-type"].startswith("text/event-stream")
    found = events(response)
    assert [name for name, _ in found] == ["hits", "token", "citations", "done"]
    hits, done = found[0][1], found[-1][1]
    assert hits["hits"] == done["hits"]
    assert hits["trace_id"] == done["trace_id"]
    assert found[2][1] == done["citations"]
    assert [*done["timings_ms"]][-1] == "generate"


@pytest.mark.parametrize("mode", ["quote", "cut", "error", "obey", "nonsense", "not-found", "wrong-citations"])
def test_the_stream_ends_in_the_same_reply(released, mode):
    """Whatever the model does, the last event is the reply that JSON would have had, and the pieces since the last restart are its answer."""
    with scripted(mode) as (url, _), answering(released[0], released[1], url) as client:
        plain = client.post("/v1/query", json=ASK).json()
        found = events(client.post("/v1/query", json={**ASK, "stream": True}))
    told = ""
    for name, data in found:
        told = "" if name in {"hits", "restart"} else told + data["text"] if name == "token" else told
    assert found[-1][0] == "done"
    assert stable(found[-1][1]) == stable(plain)
    assert told == plain["answer"]


def test_the_first_words_come_before_the_last(service):
    """What is certain is sent while the model still writes: with a model that stalls in its second sentence, the first is there."""
    client, script = service
    script.mode, script.answer = "cut", None
    with client.stream("POST", "/v1/query", json={**ASK, "stream": True}) as response:
        names = [line.removeprefix("event: ") for line in response.iter_lines() if line.startswith("event: ")]
    assert names.index("token") < names.index("done")


@pytest.mark.parametrize(("body", "code"), [({"query": " ", "stream": True}, "empty_query"), ({**ASK, "stream": "yes"}, "invalid_field")])
def test_errors_before_the_first_event_are_refusals(service, body, code):
    """What is wrong before anything was sent is a problem with its own status, also when events were asked for."""
    client, _ = service
    response = client.post("/v1/query", json=body)
    assert (response.status_code, response.json()["code"]) == (422, code)
    assert response.headers["content-type"] == "application/problem+json"


def test_not_ready_is_a_refusal(tmp_path):
    """Without a release, a request for events gets the same 503 as any other."""
    with serving(settings_for(tmp_path), LocalStore(tmp_path / "store"), ready=False) as client:
        response = client.post("/v1/query", json={**ASK, "stream": True})
    assert (response.status_code, response.json()["code"]) == (503, "not_ready")


@pytest.mark.parametrize(("error", "code"), [(RuntimeError("secret detail"), "internal"), (RaglineError("unforeseen"), "internal")])
def test_errors_after_the_first_event_are_events(released, monkeypatch, error, code):
    """What goes wrong later ends the stream with an error event that says no more than a refusal would."""

    async def broken(*_: object) -> None:
        raise error

    monkeypatch.setattr("rag_serving.generation.Writer.answer", broken)
    with serving(settings_for(released[0]), released[1]) as client:
        found = events(client.post("/v1/query", json={**ASK, "stream": True}))
    assert [name for name, _ in found] == ["hits", "error"]
    assert (found[1][1]["code"], found[1][1]["status"]) == (code, 500)
    assert "secret" not in json.dumps(found[1][1])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/query", "/v1/chat/completions"])
def test_who_leaves_stops_the_model(released, stream, path):
    """When a client leaves before its answer, the model's request ends too, and the next client is served."""
    body = {**ASK, "stream": stream} if path == "/v1/query" else {"messages": [{"role": "user", "content": ASK["query"]}], "stream": stream}
    with scripted("hang") as (url, script), answering(released[0], released[1], url, llm_timeout_seconds=50.0) as client:
        raw = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
        with socket.create_connection((client.base_url.host, client.base_url.port)) as leaving:
            leaving.sendall(head.encode() + raw)
            eventually(lambda: script.requests)
        eventually(lambda: script.abandoned)
        script.mode = "quote"
        assert client.post("/v1/query", json=ASK).json()["generated"]


def test_waiting_streams_are_kept_alive(released, monkeypatch):
    """A stream in which nothing happens sends a comment now and then, which clients ignore."""
    monkeypatch.setattr("rag_serving.edge.streaming.PING_SECONDS", 0.05)
    with scripted("stall") as (url, _), answering(released[0], released[1], url, llm_timeout_seconds=0.6) as client:
        response = client.post("/v1/query", json={**ASK, "stream": True})
    assert ": ping" in response.text
    assert [name for name, _ in events(response)] == ["hits", "restart", "token", "citations", "done"]


def test_off_topic_questions_are_not_answered(released):
    """When no hit reaches the snapshot's threshold nothing is answered and the model is not asked; `never` switches that off."""
    root, store, entry = released
    key = threshold_key(entry.manifest_sha256)
    store.write(key, json.dumps({"signal": SIGNAL, "threshold": 1.5}).encode())
    try:
        with scripted() as (url, script), embedding(settings_for(root)) as vectors:
            settings = with_model(settings_for(root, embedder_url=vectors), url)
            with serving(settings, store) as client:
                refused = client.post("/v1/query", json=ASK).json()
            assert script.requests == []
            with serving(with_model(settings, url, abstain="never"), store) as client:
                answered = client.post("/v1/query", json=ASK).json()
    finally:
        store.remove(key)
    assert (refused["abstained"], refused["citations"], refused["degraded"], len(refused["hits"]) > 0) == (True, [], [], True)
    assert (answered["abstained"], answered["generated"]) == (False, True)


def test_concurrent_streams_do_not_mix(service):
    """Many streams at once each hear their own answer."""
    client, script = service
    script.mode, replies = "quote", {}
    queries = [("delete a bucket", "s3.DeleteBucket"), ("create a user", "iam.CreateUser"), ("stop an instance", "ec2.StopInstances")] * 3

    def run(at: int) -> None:
        replies[at] = events(client.post("/v1/query", json={"query": f"How do I {queries[at][0]}?", "stream": True}))

    threads = [threading.Thread(target=run, args=(at,)) for at in range(len(queries))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [replies[at][-1][1]["citations"][0]["doc_id"] for at in range(len(queries))] == [doc_id for _, doc_id in queries]
