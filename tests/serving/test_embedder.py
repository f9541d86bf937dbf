"""The embedding service over a real socket: OpenAI's shape, fingerprints, limits, fairness and a clean end."""

import base64
import contextlib
import dataclasses
import json
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import httpx2
import numpy as np
import openai
import pytest
from live_server import running

from rag_serving.embedder import MOST_BYTES, create_app
from rag_serving.embedding.embeddings_wire import DEADLINE_HEADER
from rag_serving.errors import ConfigError
from rag_serving.models import load_model
from rag_serving.settings import Embedder, ModelSpec, Settings

FIRST = ModelSpec(name="first", source="hashing:64", dims=64, max_tokens=64, query_prompt="query: ", document_prompt="passage: ")
SECOND = ModelSpec(name="second", source="hashing:32", dims=32, max_tokens=64)
BROKEN = ModelSpec(name="broken", source="path:no-such-folder", dims=32, max_tokens=64)
SETTINGS = Settings(root=Path(), models=(FIRST, SECOND, BROKEN))


@pytest.fixture(scope="module")
def model():
    return load_model(FIRST, Path())


@pytest.fixture(scope="module")
def client():
    with (
        running(create_app(SETTINGS, preload=["first"]), ready_path="/readyz") as url,
        httpx2.Client(base_url=url, trust_env=False, timeout=20) as client,
    ):
        yield client


def ask(client, *, headers=None, **body):
    return client.post("/v1/embeddings", json={"model": "first", "input": "some text", **body}, headers=headers)


def test_reply_has_the_openai_shape(client, model):
    """One text gives one embedding with object, index, model, usage, and the fingerprint of the loaded model."""
    reply = ask(client).json()
    assert set(reply) == {"object", "data", "model", "usage", "fingerprint"}
    assert reply["object"] == "list"
    assert reply["model"] == "first"
    assert reply["usage"] == {"prompt_tokens": 2, "total_tokens": 2}
    assert reply["fingerprint"] == model.fingerprint
    assert [(row["object"], row["index"], len(row["embedding"])) for row in reply["data"]] == [("embedding", 0, 64)]


def test_input_type_chooses_the_prompt(client, model):
    """`query` gives query vectors, `document` and nothing said give document vectors, in the order of the texts."""
    texts = ["reset a password", "list the objects", "x"]
    for input_type, expected in (
        ({"input_type": "query"}, model.encode_queries(texts)),
        ({"input_type": "document"}, model.encode_documents(texts)),
        ({}, model.encode_documents(texts)),
    ):
        rows = [row["embedding"] for row in ask(client, input=texts, **input_type).json()["data"]]
        np.testing.assert_allclose(rows, expected, atol=1e-6)


def test_a_text_without_a_vector_is_refused_without_its_words(model):
    """The service is not at fault, so its clients do not leave it alone; and they log what it says, so the text is not in that."""
    app = create_app(SETTINGS, preload=["first"])
    with running(app, ready_path="/readyz") as url, httpx2.Client(base_url=url, trust_env=False, timeout=20) as client:
        app.state.shelf.loaded["first"] = dataclasses.replace(model, raw=lambda texts: np.zeros((len(texts), 64), dtype=np.float32))
        reply = ask(client, input="the words of a question", input_type="query")
    assert (reply.status_code, reply.json()["error"]["code"]) == (422, "unusable_text")
    assert "words" not in reply.text


def test_base64_is_the_same_vector(client):
    """base64 carries the same numbers as little-endian float32."""
    plain = ask(client).json()["data"][0]["embedding"]
    packed = ask(client, encoding_format="base64").json()["data"][0]["embedding"]
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(packed), "<f4"), np.asarray(plain, dtype=np.float32))


def test_a_full_request_is_served(client, model):
    """256 texts, the most of one request, come back in order."""
    texts = [f"text number {number} " * (1 + number % 7) for number in range(256)]
    rows = [row["embedding"] for row in ask(client, input=texts).json()["data"]]
    np.testing.assert_allclose(rows, model.encode_documents(texts), atol=1e-6)


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"model": "nobody"}, 404, "model"),
        ({"input": []}, 400, "input"),
        ({"input": ""}, 400, "input"),
        ({"input": "  \n"}, 400, "input"),
        ({"input": ["fine", ""]}, 400, "input"),
        ({"input": ["x"] * 257}, 400, "input"),
        ({"input": [1, 2]}, 400, "input"),
        ({"dimensions": 32}, 400, "dimensions"),
        ({"encoding_format": "hex"}, 400, "encoding_format"),
        ({"input_type": "passage"}, 400, "input_type"),
        ({"surprise": 1}, 400, "surprise"),
    ],
)
def test_bad_requests_get_openai_errors(client, body, status, param):
    """What cannot be served is a 4xx whose error names the parameter; it never reaches a model."""
    response = ask(client, **body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param)
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["message"]


def test_allowed_extras(client):
    """`user`, and `dimensions` equal to the model's, are accepted."""
    assert ask(client, user="someone", dimensions=64).status_code == 200


def test_other_media_types_are_refused(client):
    """A body that is not declared as JSON is a 415, unread."""
    response = client.post("/v1/embeddings", content=b'{"model": "first", "input": "x"}', headers={"content-type": "text/plain"})
    assert (response.status_code, response.json()["error"]["code"]) == (415, "unsupported_media_type")


def test_junk_body_is_refused(client):
    """A body that is not JSON, an unknown path and a wrong method are errors in the same shape."""
    for response, status in (
        (client.post("/v1/embeddings", content=b"{", headers={"content-type": "application/json"}), 400),
        (client.get("/v1/nothing"), 404),
        (client.get("/v1/embeddings"), 405),
    ):
        assert response.status_code == status
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_long_bodies_are_refused(client):
    """A body over the limit is a 413, stated in advance or streamed without a length."""
    long = json.dumps({"model": "first", "input": "x" * MOST_BYTES}).encode()
    headers = {"content-type": "application/json"}
    stated = client.post("/v1/embeddings", content=long, headers=headers)
    streamed = client.post("/v1/embeddings", content=(long[at : at + 65536] for at in range(0, len(long), 65536)), headers=headers)
    for response in (stated, streamed):
        assert response.status_code == 413
        assert response.json()["error"]["type"] == "invalid_request_error"


def test_models_load_on_first_use():
    """Only preloaded models are loaded at the start; another configured one loads when first asked for, and is then listed as loaded."""
    app = create_app(SETTINGS, preload=["first"])
    with running(app, ready_path="/readyz") as url, httpx2.Client(base_url=url, trust_env=False) as client:
        before = {card["id"]: card for card in client.get("/v1/models").json()["data"]}
        assert {name: card["loaded"] for name, card in before.items()} == {"first": True, "second": False, "broken": False}
        assert before["second"]["fingerprint"] is None
        fingerprint = ask(client, model="second").json()["fingerprint"]
        after = {card["id"]: card for card in client.get("/v1/models").json()["data"]}
        assert after["second"]["fingerprint"] == fingerprint
        assert fingerprint != after["first"]["fingerprint"]


def test_unloadable_model_is_a_503(client):
    """A configured model whose weights cannot be had is a 503 that says why; the others still serve."""
    response = ask(client, model="broken")
    assert response.status_code == 503
    assert "no model folder" in response.json()["error"]["message"]
    assert ask(client).status_code == 200


def test_readiness_waits_for_each_preloaded_model(client):
    """/livez answers at once; /readyz is 503 and says why while a preloaded model cannot be had, and 200 when each has embedded a text."""
    assert client.get("/livez").status_code == 200
    assert client.get("/readyz").json() == {"status": "ready", "models": {"first": "ready"}}
    with running(create_app(SETTINGS, preload=["first", "broken"]), ready_path="/livez") as url:
        deadline = time.monotonic() + 10
        while "no model folder" not in (reply := httpx2.get(url + "/readyz", trust_env=False)).json()["models"]["broken"]:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert reply.status_code == 503


def test_preloading_an_unknown_name_is_refused():
    """A name that is not configured is an error before anything listens."""
    with pytest.raises(ConfigError, match="no embedding model 'frist'"):
        create_app(SETTINGS, preload=["frist"])


def test_queries_pass_documents(client):
    """While bulk documents stream through, a query is answered between two pieces of them, long before they are done."""
    long = [f"document {number} " * 600 for number in range(256)]
    finished: list[float] = []

    def bulk() -> None:
        response = httpx2.post(str(client.base_url) + "/v1/embeddings", json={"model": "first", "input": long}, timeout=60, trust_env=False)
        assert response.status_code == 200
        finished.append(time.monotonic())

    threads = [threading.Thread(target=bulk) for _ in range(8)]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    answers = []
    for _ in range(3):
        assert ask(client, input_type="query").status_code == 200
        answers.append(time.monotonic())
    for thread in threads:
        thread.join()
    assert len(finished) == 8
    assert answers[-1] < max(finished)


def test_concurrent_queries_get_their_own_vectors(client, model):
    """Queries encoded together are not mixed up."""
    texts = [f"question {number} about {chr(97 + number % 26) * 5}" for number in range(40)]
    replies: dict[int, list[float]] = {}

    def one(number: int) -> None:
        replies[number] = ask(client, input=texts[number], input_type="query").json()["data"][0]["embedding"]

    threads = [threading.Thread(target=one, args=(number,)) for number in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_allclose([replies[number] for number in range(40)], model.encode_queries(texts), atol=1e-6)


@contextlib.contextmanager
def service_process(tmp_path, *, extra=""):
    """A ready service as a process of its own, and its address."""
    model = '[[models]]\nname = "first"\nsource = "hashing:64"\ndims = 64\nmax_tokens = 64\n'
    (tmp_path / "ragline.toml").write_text(extra + model)
    script = (
        "import pathlib, socket, sys\nfrom rag_serving.embedder import serve\nfrom rag_serving.settings import load_settings\n"
        "with socket.socket() as free:\n    free.bind(('127.0.0.1', 0))\n    port = free.getsockname()[1]\n"
        "print(port, flush=True)\n"
        "serve(load_settings(pathlib.Path('ragline.toml'), environ={}), models=['first'], host='127.0.0.1', port=port)\n"
    )
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            url = f"http://127.0.0.1:{int(child.stdout.readline())}"
            deadline = time.monotonic() + 30
            while True:
                try:
                    if httpx2.get(url + "/readyz", trust_env=False).status_code == 200:
                        break
                except httpx2.TransportError:
                    pass
                assert child.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
            yield child, url
        finally:
            if child.poll() is None:
                child.kill()


def test_sigterm_ends_the_service(tmp_path):
    """`serve` runs as a process on a given port, answers, and stops within seconds of SIGTERM."""
    with service_process(tmp_path) as (child, _):
        child.send_signal(signal.SIGTERM)
        assert child.wait(timeout=10) in {0, -signal.SIGTERM}


@pytest.mark.parametrize("encoding_format", [None, "float", "base64"])
def test_the_openai_client_works_unmodified(client, model, encoding_format):
    """The official client gets the model's own vectors, with its default encoding and with each it can ask for, and a listing of models."""
    given = {} if encoding_format is None else {"encoding_format": encoding_format}
    texts = ["reset a password", "list the objects"]
    with openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="unused", max_retries=0) as asking:
        reply = asking.embeddings.create(model="first", input=texts, **given)
        assert [card.id for card in asking.models.list()] == ["first", "second", "broken"]
        with pytest.raises(openai.NotFoundError, match="not configured"):
            asking.embeddings.create(model="nobody", input="x")
        with pytest.raises(openai.BadRequestError):
            asking.embeddings.create(model="first", input="")
    rows = [row.embedding for row in reply.data]
    if encoding_format == "base64":
        rows = [np.frombuffer(base64.b64decode(row), "<f4") for row in rows]
    np.testing.assert_allclose(rows, model.encode_documents(texts), atol=1e-6)
    assert reply.usage.total_tokens == 6


def test_metrics_count_what_happened():
    """/metrics has each outcome, batch sizes, durations and queue depths, and no label that a client makes up."""
    app = create_app(SETTINGS, preload=["first"])
    with running(app, ready_path="/readyz") as url, httpx2.Client(base_url=url, trust_env=False) as client:
        before = scraped(client)
        ask(client, input=["a", "b", "c"])
        ask(client, input_type="query")
        ask(client, model="nobody made this up")
        ask(client, model="broken")
        after = scraped(client)
    change = {name: value - before[name] for name, value in after.items() if value != before.get(name)}
    assert change['rag_embedder_requests_total{outcome="ok"}'] == 2
    assert change['rag_embedder_requests_total{outcome="client_error"}'] == 1
    assert change['rag_embedder_requests_total{outcome="unavailable"}'] == 1
    assert change['rag_embedder_batch_size_sum{input_type="query"}'] == 1
    assert change["rag_embedder_request_duration_seconds_count"] == 4
    assert after['rag_embedder_batch_size_sum{input_type="document"}'] == 3
    assert after['rag_embedder_queue_depth{input_type="query"}'] == 0
    assert not any("nobody" in name for name in after)


def scraped(client) -> dict[str, float]:
    reply = client.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain")
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in reply.text.splitlines()) if name[:1] != "#"}


@contextlib.contextmanager
def held(**embedder):
    """A service whose computing thread holds still until the event is set, with one query in its hands; and that query's reply."""
    taken, gate = threading.Event(), threading.Event()
    model = load_model(FIRST, Path())

    def raw(texts):
        taken.set()
        assert gate.wait(60)
        return model.raw(texts)

    app = create_app(SETTINGS.model_copy(update={"embedder": Embedder(**embedder)}), preload=[])
    with (
        running(app) as url,
        httpx2.Client(base_url=url, trust_env=False, timeout=60, limits=httpx2.Limits()) as client,
        ThreadPoolExecutor(max_workers=16) as threads,
    ):
        app.state.shelf.loaded["first"] = dataclasses.replace(model, raw=raw)
        try:
            first = threads.submit(ask, client, input_type="query")
            assert taken.wait(20)
            yield partial(threads.submit, ask, client), gate, app.state.bench, first
        finally:
            gate.set()


def until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_more_than_may_wait_is_refused_at_once():
    """With the line full, a request gets 429 with Retry-After while the others still wait; they are answered, and so is the next one."""
    with held(queue_texts=4) as (asking, gate, bench, first):
        others = [asking(input_type="query", input=["a", "b"]) for _ in range(2)]
        until(lambda: bench.waiting(query=True) == 4)
        refused = asking(input_type="query").result()
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert refused.json()["error"]["code"] == "overloaded"
        assert not first.done()
        gate.set()
        assert [reply.result().status_code for reply in (first, *others)] == [200, 200, 200]
        assert asking(input_type="query").result().status_code == 200


def test_late_work_is_dropped_uncomputed():
    """Work whose stated deadline passes while it waits is never computed: 504, and the room it took is free again."""
    computed = []
    with held(queue_texts=4) as (asking, gate, bench, first):
        bench._computed = computed.append
        dropped = asking(input=["x"] * 4, input_type="query", headers={DEADLINE_HEADER: "100"})
        until(lambda: bench.waiting(query=True) == 4)
        until(lambda: all(work.over for work in bench._lines[True]))
        instead = asking(input=["y"] * 4, input_type="query")
        assert (dropped.result().status_code, dropped.result().json()["error"]["code"]) == (504, "deadline_exceeded")
        gate.set()
        assert (first.result().status_code, instead.result().status_code) == (200, 200)
    assert sorted(batch.texts for batch in computed) == [1, 4]


def test_a_deadline_must_be_a_number(client):
    """A deadline header that is none is a 400 that names it."""
    for value in ("soon", "-5", "1e3", ""):
        response = client.post("/v1/embeddings", json={"model": "first", "input": "x"}, headers={DEADLINE_HEADER: value})
        assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_deadline")


def test_requests_that_wait_are_computed_together():
    """What waits when the thread gets free is one batch, up to the budget of tokens; a request over it is shared out over several."""
    batches = []
    with held(batch_tokens=64) as (asking, gate, bench, first):
        bench._computed = batches.append
        others = [asking(input=f"text {number}", input_type="query") for number in range(8)]
        until(lambda: bench.waiting(query=True) == 8)
        long = asking(input=["some words of a text"] * 20, input_type="query")
        until(lambda: bench.waiting(query=True) == 28)
        gate.set()
        assert {reply.result().status_code for reply in (first, *others, long)} == {200}
    assert len(long.result().json()["data"]) == 20
    assert [batch.texts for batch in batches[:2]] == [1, 8 + 5]  # 8 texts of 3 tokens and 5 of 7 are 59 of 64
    assert [batch.texts for batch in batches[2:]] == [9, 6]


def test_one_bad_text_fails_alone(client):
    """A query that gives no vector does not take those down that are computed with it."""
    replies = {}

    def one(number: int) -> None:
        text = "\u200b" if number == 3 else f"question {number}"
        replies[number] = ask(client, input=text, input_type="query", model="second").status_code

    threads = [threading.Thread(target=one, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {number: status for number, status in replies.items() if status != 200}.keys() <= {3}


def test_draining_fails_readiness_first(tmp_path):
    """After SIGTERM the service says that it is not ready while it still takes and answers requests; then it ends."""
    with service_process(tmp_path, extra="[embedder]\ndrain_seconds = 1.5\n") as (child, url):
        child.send_signal(signal.SIGTERM)
        until(lambda: httpx2.get(url + "/readyz", trust_env=False).status_code == 503)
        assert httpx2.get(url + "/readyz", trust_env=False).json()["models"] == {"first": "ending"}
        reply = httpx2.post(url + "/v1/embeddings", json={"model": "first", "input": "x"}, trust_env=False)
        assert reply.status_code == 200
        assert child.wait(timeout=15) in {0, -signal.SIGTERM}


def test_a_second_signal_does_not_wait(tmp_path):
    """A second SIGTERM ends a service that drains for a minute."""
    with service_process(tmp_path, extra="[embedder]\ndrain_seconds = 60\n") as (child, url):
        child.send_signal(signal.SIGTERM)
        until(lambda: httpx2.get(url + "/readyz", trust_env=False).status_code == 503)
        child.send_signal(signal.SIGTERM)
        assert child.wait(timeout=15) in {0, -signal.SIGTERM}
