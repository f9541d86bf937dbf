"""Query encoders: local and remote give the same vectors, and what is not usable is refused with the right error."""

import asyncio
import json
import socket
import time
from pathlib import Path

import numpy as np
import pytest
from live_server import running
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from rag_serving.embedder import create_app
from rag_serving.encoding import LocalEncoder, RemoteEncoder, checked_vectors
from rag_serving.errors import EncoderError, EncoderUnavailable, ModelMismatch
from rag_serving.models import load_model
from rag_serving.settings import ModelSpec, Settings

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


def remote(url: str, fingerprint: str, *, dims: int = 64, timeout_seconds: float = 5.0) -> RemoteEncoder:
    return RemoteEncoder(url, SPEC.name, fingerprint, dims=dims, timeout_seconds=timeout_seconds)


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
    """429 and 5xx mean: go on without this encoder; the error carries the service's message and the remedy."""
    reply = JSONResponse({"error": {"message": "too busy", "type": "server_error", "param": None, "code": None}}, status_code=status)
    with running(answering(lambda _: reply)) as url, pytest.raises(EncoderUnavailable, match=f"{status}: too busy") as caught:
        encoded(remote(url, "f"))
    assert "ragline embedder" in caught.value.fix


def test_junk_is_not_a_reply():
    """A 200 that is not an embeddings reply is an EncoderError."""
    with running(answering(lambda _: {"hello": "world"})) as url, pytest.raises(EncoderError, match="no usable reply"):
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
