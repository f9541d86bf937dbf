"""The probe of the embedding service: what it sees of the same model, of another one, and of a service that says nothing usable."""

import asyncio
import json
from contextlib import contextmanager

import numpy as np
import pytest
from live_server import running
from small_service import SPEC, build, embedding, release, settings_for

from rag_serving.embedding.vector_probe import VectorProbe, mean_cosine, paired
from rag_serving.errors import EncoderError, EncoderUnavailable
from rag_serving.live import Live
from rag_serving.retrieval import Retriever
from rag_serving.settings import EncoderClient
from rag_serving.snapshots import snapshot_ids
from rag_serving.store import LocalStore

SECRET = "wombat-4711"


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A store with one release. Not to be changed."""
    root = tmp_path_factory.mktemp("probe")
    store = LocalStore(root / "store")
    release(store, build(store, settings_for(root)))
    return root, store


@contextmanager
def answering(reply: bytes, status: int = 200, asked: list | None = None):
    """Something at an address that answers every POST with `reply`."""

    async def app(scope, receive, send):
        if scope["type"] == "http":
            body = (await receive()).get("body", b"")
            if asked is not None and body:
                asked.append(json.loads(body))
            await send({"type": "http.response.start", "status": status, "headers": []})
            await send({"type": "http.response.body", "body": reply})

    with running(app) as url:
        yield url


def compared(released, url: str):
    """What a probe of the release sees at an address."""
    root, store = released
    settings = settings_for(root, embedder_url=url)

    async def look():
        live = Live(store, settings)
        live.start()
        async with asyncio.timeout(30):
            while live.serving is None:  # noqa: ASYNC110 - it tells nobody
                await asyncio.sleep(0.01)
        try:
            return await VectorProbe(live, settings).compare()
        finally:
            await live.stop()

    return asyncio.run(look())


def test_the_same_model_gives_the_stored_vectors(released):
    """The embedding service as configured: cosine 1 and the snapshot's fingerprint."""
    with embedding(settings_for(released[0])) as url:
        seen = compared(released, url)
    assert seen.cosine == pytest.approx(1, abs=1e-6)
    assert seen.same_model is True


def test_another_model_is_told_by_both(released):
    """Another prompt for documents gives another fingerprint and other vectors."""
    other = settings_for(released[0], spec=SPEC.model_copy(update={"document_prompt": "passage: "}))
    with embedding(other) as url:
        seen = compared(released, url)
    assert seen.same_model is False
    assert seen.cosine < 0.999


def test_a_service_without_prompts_gets_them(released):
    """A service that names no fingerprint says nothing of its model; where it is believed by what it does, texts come with their prompt."""
    asked: list = []
    row = np.eye(1, SPEC.dims).tolist()[0]
    reply = json.dumps({"data": [{"index": at, "embedding": row} for at in range(5)]}).encode()
    spec = SPEC.model_copy(update={"document_prompt": "passage: "})
    root, store = released

    async def look(settings):
        retriever = await Retriever.open(store, snapshot_ids(store)[0])
        try:
            return await paired(settings, retriever.manifest, *await retriever.samples(5))
        finally:
            retriever.close()

    with answering(reply, asked=asked) as url:
        changes = {"encoder": EncoderClient(unnamed="probe"), "models": (spec,)}
        seen = asyncio.run(look(settings_for(root, embedder_url=url).model_copy(update=changes)))
    assert (seen.same_model, seen.cosine < 0.999) == (None, True)
    assert "input_type" not in asked[-1]
    assert all(text.startswith("passage: ") for text in asked[-1]["input"])


@pytest.mark.parametrize(
    ("reply", "status"),
    [(b"no", 500), (f"{SECRET}".encode(), 200), (b'{"data": []}', 200), (b'{"data": [{"index": 0, "embedding": [NaN]}]}', 200)],
)
def test_what_is_no_answer_is_an_error(released, reply, status):
    """A refusal, a reply of another shape, and numbers that are none: an error that quotes nothing of the reply."""
    with answering(reply, status) as url, pytest.raises(EncoderError) as caught:
        compared(released, url)
    assert SECRET not in str(caught.value)


def test_a_service_that_is_down_is_named(released):
    """Nobody listens at the address: EncoderUnavailable, with what to do."""
    with pytest.raises(EncoderUnavailable, match="ragline embedder"):
        compared(released, "http://127.0.0.1:9")


def test_nothing_is_compared_before_a_release(tmp_path):
    """Without an open release there are no stored vectors."""
    settings = settings_for(tmp_path)
    assert asyncio.run(VectorProbe(Live(LocalStore(tmp_path / "store"), settings), settings).compare()) is None


def test_vectors_of_another_length_have_nothing_alike():
    """They count as cosine 0, so that whoever watches the cosine sees them."""
    assert mean_cosine(np.ones((2, 4), np.float32) / 2, np.ones((2, 3), np.float32)) == 0.0
