"""The phases in order on one snapshot, and what a request does without."""

import asyncio
import json
import time
from pathlib import Path

import pytest
from live_server import running
from small_service import SPEC, build, release, serving, settings_for
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

from rag_serving.deadline import Deadline
from rag_serving.errors import DeadlineExceeded
from rag_serving.exchange import Exchange
from rag_serving.models import load_model
from rag_serving.retrieval import Retriever
from rag_serving.settings import Retrieval, Weights
from rag_serving.signals import trace
from rag_serving.store import LocalStore

ASK = {"query": "How do I delete a bucket?"}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipeline")
    store = LocalStore(root)
    release(store, build(store, settings_for(root)))
    return store


def test_phases_are_timed_in_order():
    """Each phase leaves its milliseconds, also one that fails."""
    exchange = Exchange("0" * 32, trace.tracer(trace.provider()), Deadline.after(60))
    with exchange.phase("encode"):
        time.sleep(0.01)
    with pytest.raises(ValueError, match="broken"), exchange.phase("retrieve"):
        raise ValueError("broken")
    assert [*exchange.timings_ms] == ["encode", "retrieve"]
    assert exchange.timings_ms["encode"] >= 10


def test_nothing_starts_after_the_deadline():
    """A phase whose request has run out of time is refused instead of started."""
    exchange = Exchange("0" * 32, trace.tracer(trace.provider()), Deadline.after(0))
    with pytest.raises(DeadlineExceeded, match="before encode"), exchange.phase("encode"):
        pytest.fail("it started")


def embedder(vector) -> Starlette:
    """A real server that gives `vector` for every query, under the right fingerprint."""
    fingerprint = load_model(SPEC, Path()).fingerprint

    async def embeddings(request) -> Response:
        if vector is None:
            await asyncio.sleep(1.5)
        reply = {"data": [{"index": 0, "embedding": vector}], "fingerprint": fingerprint}
        return Response(json.dumps(reply), media_type="application/json")

    return Starlette(routes=[Route("/v1/embeddings", embeddings, methods=["POST"])])


@pytest.mark.parametrize(
    "vector",
    [[float("nan")] * 64, [0.0] * 64, [0.5] * 64, [1.0] + [0.0] * 62, []],
    ids=["NaN", "zero", "norm 4", "63 dims", "empty"],
)
def test_unusable_vectors_are_done_without(store, tmp_path, vector):
    """NaN, zero, unnormalised or misshapen vectors are never searched with: full text answers, and the reply says so."""
    with running(embedder(vector)) as url, serving(settings_for(tmp_path, embedder_url=url), store) as client:
        body = client.post("/v1/query", json=ASK).json()
    assert body["degraded"] == ["embedding"]
    assert body["citations"][0]["doc_id"] == "s3.DeleteBucket"


def test_slow_embedder_costs_its_timeout_at_most(store, tmp_path):
    """A hanging embedding service delays an answer by serving.encode_timeout_seconds (1 s here), no longer."""
    with running(embedder(None)) as url, serving(settings_for(tmp_path, embedder_url=url, encode_timeout_seconds=1.0), store) as client:
        started = time.perf_counter()
        assert client.post("/v1/query", json=ASK).json()["degraded"] == ["embedding"]
        assert time.perf_counter() - started < 1.4


def test_a_search_that_hangs_ends_with_the_request(store, tmp_path, monkeypatch):
    """A search that never returns is given up at the request's deadline, with a refusal that says so."""

    async def hang(*_, **__) -> None:
        await asyncio.sleep(5)

    with serving(settings_for(tmp_path), store) as client:
        monkeypatch.setattr(Retriever, "retrieve", hang)
        started = time.perf_counter()
        reply = client.post("/v1/retrieve", json={**ASK, "deadline_ms": 300})
    assert (reply.status_code, reply.json()["code"]) == (504, "deadline_exceeded")
    assert time.perf_counter() - started < 3


def test_vectors_only_snapshot_still_answers(tmp_path):
    """A snapshot fused from vectors alone is searched by its words when there are no vectors."""
    dense = Weights(bm25_text=0, bm25_title=0)
    settings = settings_for(tmp_path).model_copy(update={"retrieval": Retrieval(weights=dense)})
    store = LocalStore(tmp_path / "store")
    release(store, build(store, settings))
    with serving(settings, store) as client:
        body = client.post("/v1/query", json=ASK).json()
    assert body["degraded"] == ["embedding"]
    assert body["hits"][0]["doc_id"] == "s3.DeleteBucket"
