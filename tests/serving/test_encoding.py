"""Query encoders: local and remote give the same vectors, and what is not usable is refused with the right error."""

import asyncio
import base64
import gzip
import json
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from live_server import running
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from rag_serving import connections
from rag_serving.deadline import Deadline
from rag_serving.embedder import create_app
from rag_serving.embedding.embeddings_wire import DEADLINE_HEADER
from rag_serving.embedding.remote_encoder import RemoteEncoder
from rag_serving.encoding import LocalEncoder, checked_vectors
from rag_serving.errors import EncoderError, EncoderUnavailable, ModelMismatch
from rag_serving.models import load_model
from rag_serving.settings import EncoderClient, ModelSpec, Settings

SPEC = ModelSpec(name="hashing", source="hashing:64", dims=64, max_tokens=64, query_prompt="query: ")
QUERIES = ["list the objects", "reset a password"]


@pytest.fixture(scope="module")
def model():
    return load_model(SPEC, Path())


@pytest.fixture(scope="module")
def service(model):
    settings = Settings(root=Path(), models=(SPEC,))
    with running(create_app(settings, preload=[SPEC.name]), ready_path="/readyz") as url:
        yield url


def remote(url: str, fingerprint: str, *, dims: int = 64, timeout_seconds: float = 5.0, **client) -> RemoteEncoder:
    asking = EncoderClient(**{"cache_entries": 0, **client})
    return RemoteEncoder(url, SPEC.name, fingerprint, dims=dims, timeout_seconds=timeout_seconds, client=asking)


def encoded(encoder, queries=QUERIES):
    async def run():
        try:
            return await encoder.encode(queries)
        finally:
            await encoder.aclose()

    return asyncio.run(run())


def answering(reply) -> Starlette:
    """A real server whose /v1/embeddings answers `reply(body)`: a mapping, or a Response."""

    async def embeddings(request: Request) -> Response:
        given = reply(await request.json())
        if asyncio.iscoroutine(given):
            given = await given
        return given if isinstance(given, Response) else Response(json.dumps(given), media_type="application/json")

    return Starlette(routes=[Route("/v1/embeddings", embeddings, methods=["POST"])])


def counting(reply, *, delays=()):
    """A server that answers `reply(body)`, the n-th request after `delays[n]` seconds or once that event is set; and the requests it got."""
    asked = []

    async def embeddings(request: Request) -> Response:
        number = len(asked)
        asked.append(request)
        body = await request.json()
        delay = delays[number] if number < len(delays) else 0
        if isinstance(delay, threading.Event):
            await asyncio.to_thread(delay.wait, 20)
        else:
            await asyncio.sleep(delay)
        given = reply(body)
        return given if isinstance(given, Response) else JSONResponse(given)

    return Starlette(routes=[Route("/v1/embeddings", embeddings, methods=["POST"])]), asked


def unit_reply(body):
    return vectors_reply([[1.0, 0.0]] * len(body["input"]))


def refusal(status: int, **headers: str) -> JSONResponse:
    return JSONResponse({"error": {"message": "too busy"}}, status_code=status, headers=headers)


def asking(encoder, *calls, each=lambda _: None):
    """Encode each of `calls` in turn in one loop; the errors and vectors that came of it."""

    async def run():
        results = []
        for call in calls:
            try:
                results.append(await encoder.encode(call))
            except EncoderError as error:
                results.append(error)
            each(results)
        await encoder.aclose()
        return results

    return asyncio.run(run())


def vectors_reply(rows, *, fingerprint="f", indices=None):
    data = [{"object": "embedding", "index": at, "embedding": row} for at, row in zip(indices or range(len(rows)), rows, strict=True)]
    return {"object": "list", "data": data, "model": "hashing", "fingerprint": fingerprint}


def test_remote_and_local_agree(service, model):
    """Both encoders give the model's own query vectors, prompt included, in order."""
    own = model.encode_queries(QUERIES)
    np.testing.assert_allclose(encoded(LocalEncoder(model)), own, atol=1e-6)
    np.testing.assert_allclose(encoded(remote(service, model.fingerprint)), own, atol=1e-6)


def test_many_queries_are_sent_in_groups(service, model):
    """More queries than one request may carry are still one call, and come back in order."""
    queries = [f"query number {number}" for number in range(300)]
    np.testing.assert_allclose(encoded(remote(service, model.fingerprint), queries), model.encode_queries(queries), atol=1e-6)


def test_no_queries_no_rows(service, model):
    """An empty list gives (0, dims) from both encoders."""
    assert encoded(LocalEncoder(model), []).shape == (0, 64)
    assert encoded(remote(service, model.fingerprint), []).shape == (0, 64)


def test_one_encoder_in_two_loops(service, model):
    """A closed encoder can be used again, also in another event loop."""
    encoder = remote(service, model.fingerprint)
    np.testing.assert_array_equal(encoded(encoder), encoded(encoder))


def test_other_fingerprint_is_a_mismatch(service):
    """Vectors of another model than the snapshot's are never used, whatever their shape."""
    with pytest.raises(ModelMismatch, match="the snapshot needs 000000000000"):
        encoded(remote(service, "0" * 64))


def test_reply_without_fingerprint_is_a_mismatch():
    """A service that does not say which model it serves is not trusted."""
    reply = vectors_reply([[1.0, 0.0]] * 2, fingerprint=None)
    with running(answering(lambda _: reply)) as url, pytest.raises(ModelMismatch, match="fingerprint none"):
        encoded(remote(url, "f", dims=2))


def test_unknown_model_is_refused_by_name(service):
    """A model the service does not have is an EncoderError that names it, not an outage."""
    encoder = RemoteEncoder(service, "nobody", "f", dims=64, timeout_seconds=5)
    with pytest.raises(EncoderError, match="refused 'nobody' with 404") as caught:
        encoded(encoder)
    assert not isinstance(caught.value, EncoderUnavailable)


@pytest.mark.parametrize(
    ("rows", "indices", "says"),
    [
        ([[float("nan"), 0.0], [1.0, 0.0]], None, "NaN or infinite|no usable reply"),
        ([[float("inf"), 0.0], [1.0, 0.0]], None, "NaN or infinite|no usable reply"),
        ([[2.0, 0.0], [1.0, 0.0]], None, "length 2"),
        ([[0.0, 0.0], [1.0, 0.0]], None, "length 0"),
        ([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]], None, "shape"),
        ([[1.0, 0.0], [1.0]], None, "unequal length"),
        ([[1.0, 0.0]], None, "1 vectors for 2 texts"),
        ([[1.0, 0.0], [0.0, 1.0]], [1, 0], "not in order"),
    ],
)
def test_unusable_vectors_are_refused(rows, indices, says):
    """NaN, infinity, a wrong norm, shape, count or order in a reply is an EncoderError and never reaches a search."""
    with (
        running(answering(lambda _: vectors_reply(rows, indices=indices))) as url,
        pytest.raises(EncoderError, match=says) as caught,
    ):
        encoded(remote(url, "f", dims=2))
    assert type(caught.value) is EncoderError


@pytest.mark.parametrize("status", [429, 500, 503])
def test_overload_and_failure_are_unavailability(status):
    """429 and 5xx mean: go on without this encoder; the error has the status, none of the service's words, and the remedy."""
    reply = JSONResponse({"error": {"message": "too busy", "type": "server_error", "param": None, "code": None}}, status_code=status)
    with running(answering(lambda _: reply)) as url, pytest.raises(EncoderUnavailable, match=f"answered {status}") as caught:
        encoded(remote(url, "f"))
    assert "ragline embedder" in caught.value.fix


def test_junk_is_not_a_reply():
    """A 200 that is not an embeddings reply is an EncoderError."""
    with running(answering(lambda _: {"hello": "world"})) as url, pytest.raises(EncoderError, match="no usable reply"):
        encoded(remote(url, "f"))


def test_a_compressed_reply_is_unavailability():
    """Compression is not asked for: a reply that says it is compressed is the service's failure, not the request's."""
    packed = Response(gzip.compress(b"{}"), headers={"Content-Encoding": "gzip"}, media_type="application/json")
    with running(answering(lambda _: packed)) as url, pytest.raises(EncoderUnavailable, match="gzip"):
        encoded(remote(url, "f"))


def test_nobody_listening_is_unavailability():
    """A refused connection is EncoderUnavailable with the address and the remedy."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(EncoderUnavailable, match=url) as caught:
            encoded(remote(url, "f"))
    assert "ragline embedder" in caught.value.fix


def test_slow_service_times_out():
    """One encode takes no longer than its timeout, also when the service hangs."""

    async def hang(_: object) -> dict[str, object]:
        await asyncio.sleep(1.5)
        return {}

    async def timed(url: str) -> float:
        encoder = remote(url, "f", timeout_seconds=0.2)
        before = time.monotonic()
        with pytest.raises(EncoderUnavailable, match=r"within 0\.2 s"):
            await encoder.encode(QUERIES)
        seconds = time.monotonic() - before
        await encoder.aclose()
        return seconds

    with running(answering(hang)) as url:
        assert asyncio.run(timed(url)) < 1.0


def test_connections_are_kept(model):
    """Requests one after another share a connection."""
    app = create_app(Settings(root=Path(), models=(SPEC,)), preload=[SPEC.name])
    callers = []

    async def noting(scope, receive, send) -> None:
        if scope["type"] == "http" and scope["path"] == "/v1/embeddings":
            callers.append(scope["client"])
        await app(scope, receive, send)

    async def five_times(encoder: RemoteEncoder) -> None:
        for _ in range(5):
            await encoder.encode(QUERIES)
        await encoder.aclose()

    with running(noting, ready_path="/readyz") as url:
        asyncio.run(five_times(remote(url, model.fingerprint)))
    assert len(callers) == 5
    assert len(set(callers)) == 1


def test_closed_idle_connection_is_replaced(model):
    """A kept connection that the service closed meanwhile costs one silent second try, not an error."""
    asked = []

    def reply(body):
        asked.append(body)
        return JSONResponse(vectors_reply(model.encode_queries(body["input"]).tolist(), fingerprint=model.fingerprint))

    async def twice(url: str) -> None:
        encoder = remote(url, model.fingerprint)
        await encoder.encode(QUERIES)
        await asyncio.sleep(1.3)
        await encoder.encode(QUERIES)
        await encoder.aclose()

    with running(answering(reply), keep_alive=1) as url:
        asyncio.run(twice(url))
    assert len(asked) == 2


def test_local_encoder_leaves_the_loop_free(model):
    """While a local model computes, other tasks of the event loop run."""

    async def ticks() -> int:
        encoder = LocalEncoder(model)
        work = asyncio.create_task(encoder.encode([f"some text number {number} " * 30 for number in range(400)]))
        count = 0
        while not work.done():
            await asyncio.sleep(0.001)
            count += 1
        await work
        await encoder.aclose()
        return count

    assert asyncio.run(ticks()) >= 3


@pytest.mark.parametrize("vectors", [[["a"]], [[1.0], [1.0, 2.0]], [[np.nan]], [[1.01]], [1.0]])
def test_checked_vectors_refuses(vectors):
    """The shared check refuses what is not (count, dims) finite unit vectors."""
    with pytest.raises(EncoderError):
        checked_vectors(vectors, count=1, dims=1, origin="a test")


def test_known_queries_are_not_asked_again():
    """A vector is kept by text, the least recently used one goes first when there are more than `cache_entries`, and hits are counted."""
    app, asked = counting(unit_reply)
    with running(app) as url:
        encoder = remote(url, "f", dims=2, cache_entries=2)
        asking(encoder, ["a", "b"], ["a"], ["a", "b"], ["c"], ["a"], ["b"])
    assert len(asked) == 4  # a and b, c which drops a, a which drops b, b
    assert (encoder.traffic.cache_hits, encoder.traffic.cache_misses) == (3, 5)


def test_only_unknown_queries_are_sent(service, model):
    """Repeated and known queries of a call are not sent, and each row is still the one of its query."""
    encoder = remote(service, model.fingerprint, cache_entries=10)
    queries = ["one", "two", "one", "three", "two"]
    _, rows = asking(encoder, ["two"], queries)
    np.testing.assert_allclose(rows, model.encode_queries(queries), atol=1e-6)
    assert encoder.traffic.cache_misses == 3


def test_a_cached_vector_cannot_be_changed_from_outside():
    """What a caller does to its vectors does not reach the next caller."""
    app, _ = counting(unit_reply)
    with running(app) as url:
        encoder = remote(url, "f", dims=2, cache_entries=2)
        first, second = asking(encoder, ["a"], ["a"], each=lambda results: results[0].fill(7) if len(results) == 1 else None)
    np.testing.assert_array_equal(second, [[1.0, 0.0]])
    assert first[0, 0] == 7


@pytest.mark.parametrize("status", [429, 503])
def test_one_second_try(status):
    """429 and 503 are tried once more, and only once."""
    replies = iter([refusal(status), None, refusal(status), refusal(status)])
    app, asked = counting(lambda body: next(replies) or unit_reply(body))
    with running(app) as url:
        encoder = remote(url, "f", dims=2)
        encoder._retries.earn()
        for _ in range(10):
            encoder._retries.earn()
        good, bad = asking(encoder, ["a"], ["b"])
    assert good.shape == (1, 2)
    assert isinstance(bad, EncoderUnavailable)
    assert (len(asked), encoder.traffic.requests, encoder.traffic.retries) == (4, 2, 2)


def test_second_tries_keep_to_their_share():
    """When everything fails, at most one request in ten is made twice, beside the first: retries never double the load."""
    app, asked = counting(lambda _: refusal(503))
    with running(app) as url:
        encoder = remote(url, "f", dims=2, breaker_failures=100)
        asking(encoder, *[[f"q {number}"] for number in range(50)])
    assert len(asked) <= 50 * 1.1 + 1
    assert encoder.traffic.retries == len(asked) - 50 >= 5


@pytest.mark.parametrize("status", [400, 404, 500])
def test_what_would_fail_again_is_not_tried_again(status):
    """Refusals and faults of the service are not repeated."""
    app, asked = counting(lambda _: refusal(status))
    with running(app) as url:
        asking(remote(url, "f", dims=2), ["a"])
    assert len(asked) == 1


def test_no_second_try_that_would_come_too_late():
    """A Retry-After beyond what is left of the deadline is not waited for."""
    app, asked = counting(lambda _: refusal(429, **{"Retry-After": "30"}))
    with running(app) as url:
        asking(remote(url, "f", dims=2), ["a"])
    assert len(asked) == 1


def test_the_breaker_opens_and_closes():
    """Five failures open it: then nothing is asked and the error is immediate. After its pause one call tries, and success closes it."""
    healthy = []
    app, asked = counting(lambda body: unit_reply(body) if healthy else refusal(500))
    with running(app) as url:
        encoder = remote(url, "f", dims=2, breaker_open_seconds=0.3)
        results = asking(encoder, *[["a"]] * 8)
        assert (len(asked), encoder.state, encoder.traffic.refused) == (5, "open", 3)
        assert "failed repeatedly" in str(results[-1])
        healthy.append(True)
        time.sleep(0.35)
        assert encoder.state == "half_open"
        assert not isinstance(asking(encoder, ["a"], ["b"])[1], EncoderError)
        assert encoder.state == "closed"


@pytest.mark.parametrize("rows", [[[float("nan"), 0.0]], [[2.0, 0.0]], [[1.0, 0.0, 0.0]]])
def test_unusable_vectors_open_the_breaker(rows):
    """A service that answers nonsense is left alone like one that does not answer."""
    with running(answering(lambda _: vectors_reply(rows))) as url:
        encoder = remote(url, "f", dims=2)
        asking(encoder, *[["a"]] * 5)
    assert (encoder.state, encoder.traffic.failures) == ("open", 5)


def test_a_mismatch_does_not_open_the_breaker(service):
    """Another model's fingerprint is the same clear error every time, however often it is asked."""
    encoder = remote(service, "0" * 64)
    results = asking(encoder, *[["a"]] * 7)
    assert [type(result) for result in results] == [ModelMismatch] * 7
    assert encoder.state == "closed"


def test_impatient_callers_do_not_open_the_breaker():
    """A caller that grants next to no time says nothing about the service when it gives up."""

    async def run(url: str) -> RemoteEncoder:
        encoder = remote(url, "f", dims=2, timeout_seconds=5)
        for _ in range(7):
            with pytest.raises(EncoderUnavailable, match="within"):
                await encoder.encode(["a"], deadline=Deadline.after(0.02))
        await encoder.aclose()
        return encoder

    app, _ = counting(unit_reply, delays=[0.5] * 7)
    with running(app) as url:
        assert asyncio.run(run(url)).state == "closed"


def test_the_deadline_travels():
    """The service hears how long the caller still waits: the less of its deadline and the encoder's own patience."""
    app, asked = counting(unit_reply)

    async def run(url: str) -> None:
        encoder = remote(url, "f", dims=2, timeout_seconds=5)
        await encoder.encode(["a"], deadline=Deadline.after(2))
        await encoder.encode(["a"], deadline=Deadline.after(60))
        await encoder.encode(["a"])
        await encoder.aclose()

    with running(app) as url:
        asyncio.run(run(url))
    stated = [int(request.headers[DEADLINE_HEADER]) for request in asked]
    assert 0 < stated[0] <= 2000
    assert all(2000 < value <= 5000 for value in stated[1:])


def hedging(url: str, *, seconds: float) -> RemoteEncoder:
    """An encoder that has seen enough calls, each of which took so long."""
    encoder = remote(url, "f", dims=2, timeout_seconds=20, hedge_share=0.05)
    encoder._latencies.extend([seconds] * 50)
    return encoder


def test_a_slow_request_is_hedged():
    """With hedging on, a request beyond the rolling p95 is sent again and the quicker answer counts."""
    answered = threading.Event()
    app, asked = counting(unit_reply, delays=[answered])

    async def run(url: str) -> RemoteEncoder:
        encoder = hedging(url, seconds=0.05)
        await encoder.encode(["slow"])
        answered.set()
        await encoder.aclose()
        return encoder

    with running(app) as url:
        encoder = asyncio.run(run(url))
    assert (len(asked), encoder.traffic.requests, encoder.traffic.hedges) == (2, 1, 1)


def test_hedges_keep_to_their_share():
    """However many requests are slow, at most one in twenty is sent twice, beside the first."""
    app, asked = counting(unit_reply, delays=[0.02] * 200)

    async def run(url: str) -> RemoteEncoder:
        encoder = hedging(url, seconds=0.001)
        for number in range(60):
            encoder._latencies.extend([0.001] * 256)
            await encoder.encode([f"q {number}"])
        await encoder.aclose()
        return encoder

    with running(app) as url:
        encoder = asyncio.run(run(url))
    assert 2 <= encoder.traffic.hedges <= 60 * 0.05 + 1
    assert len(asked) <= 60 + encoder.traffic.hedges


def test_hedging_waits_for_the_other_answer():
    """When the first of two requests fails, the second one's answer still counts."""
    replies = [refusal(500), None]
    app, asked = counting(lambda body: replies.pop(0) or unit_reply(body), delays=[0.3, 0.9])

    async def run(url: str):
        encoder = hedging(url, seconds=0.05)
        rows = await encoder.encode(["a"])
        await encoder.aclose()
        return rows

    with running(app) as url:
        assert asyncio.run(run(url)).shape == (1, 2)
    assert len(asked) == 2


def test_an_endless_reply_is_cut():
    """A reply longer than the vectors could be is refused, not collected."""
    sent = []

    async def endless():
        while len(sent) < 4000:
            sent.append(1)
            yield b"x" * 65536

    with running(answering(lambda _: StreamingResponse(endless()))) as url:
        (error,) = asking(remote(url, "f", dims=2), ["a"])
    assert "gave more than" in str(error)


def test_float_replies_are_read_too():
    """A service that ignores base64 and sends numbers is understood; base64 that holds no vector is refused."""
    packed = base64.b64encode(np.array([1, 0], "<f4").tobytes()).decode()
    for given, expected in (([1.0, 0.0], True), (packed, True), ("!!", False), (packed[:4], False), ("", False)):
        with running(answering(lambda _, given=given: vectors_reply([given]))) as url:
            (result,) = asking(remote(url, "f", dims=2), ["a"])
        assert isinstance(result, np.ndarray) == expected, given


def test_local_encoders_keep_deadlines(model):
    """A local encode whose deadline passes is EncoderUnavailable like a remote one."""

    async def run() -> None:
        encoder = LocalEncoder(model)
        with pytest.raises(EncoderUnavailable, match="in time"):
            await encoder.encode([f"some text number {number} " * 30 for number in range(400)], deadline=Deadline.after(0.005))
        await encoder.aclose()

    asyncio.run(run())


def test_waiting_for_a_connection_is_measured(monkeypatch):
    """Where calls outnumber connections, those that wait tell how long, also one that is given up before its turn."""
    monkeypatch.setattr(connections, "MOST_CONNECTIONS", 1)
    waits = []

    async def slowly(_: Request) -> Response:
        await asyncio.sleep(0.2)
        return Response(b"{}")

    async def asked(url: str) -> None:
        pool = connections.Pool(waited=waits.append)
        calls = [asyncio.create_task(pool.post(url, b"{}", {}, most=10)) for _ in range(3)]
        await asyncio.sleep(0.1)
        calls[2].cancel()
        assert [reply.status for reply in await asyncio.gather(*calls[:2])] == [200, 200]
        await pool.aclose()

    with running(Starlette(routes=[Route("/", slowly, methods=["POST"])])) as url:
        asyncio.run(asked(f"{url}/"))
    first, given_up, second = sorted(waits)
    assert first < 0.05 < given_up < 0.15 < second
