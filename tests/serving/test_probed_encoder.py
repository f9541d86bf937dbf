"""Embedding services that name no fingerprint: refused unless asked for, and then believed only while they give stored vectors again."""

import asyncio

import numpy as np
import pytest
from nameless import nameless
from pydantic import ValidationError
from small_service import SPEC, build, problem, release, serving, settings_for, until

from rag_serving.embedding import probed_encoder
from rag_serving.embedding.probed_encoder import probed
from rag_serving.embedding.remote_encoder import RemoteEncoder
from rag_serving.errors import ConfigError, EncoderUnavailable, ModelMismatch
from rag_serving.models import load_model
from rag_serving.retrieval import Retriever
from rag_serving.settings import EncoderClient, Settings
from rag_serving.store import LocalStore

PROMPTED = SPEC.model_copy(update={"query_prompt": "query: ", "document_prompt": "passage: "})
QUESTION = "How do I delete a bucket?"


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    """A service without fingerprints that can serve the model of the snapshots here, or another one under the same name."""
    with nameless(tmp_path_factory.mktemp("nameless"), same=SPEC, other=SPEC.model_copy(update={"document_prompt": "other: "})) as found:
        yield found


@pytest.fixture(autouse=True)
def _as_it_was(service):
    state = service[1]
    state.serves, state.down, state.cuts, state.strict = "same", False, 0, True
    state.asked.clear()


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    root = tmp_path_factory.mktemp("probed")
    store = LocalStore(root / "store")
    release(store, build(store, settings_for(root)))
    return root, store


def asking(root, url, **client) -> Settings:
    settings = settings_for(root, embedder_url=url)
    return settings.model_copy(update={"encoder": EncoderClient(unnamed="probe", **client)})


def opened(released, url, use, *, settings: Settings | None = None, **client):
    """What `use(encoder)` gives, with the encoder of the released snapshot."""
    root, store = released
    settings = settings or asking(root, url, **client)

    async def run():
        (snapshot_id,) = [path.name for path in (root / "store" / "snapshots").iterdir()]
        retriever = await Retriever.open(store, snapshot_id)
        try:
            encoder = await probed(retriever, settings)
            try:
                return await use(encoder)
            finally:
                await encoder.aclose()
        finally:
            retriever.close()

    return asyncio.run(run())


def test_it_is_refused_unless_asked_for(service, released):
    """By default vectors without a fingerprint are never used."""
    model = load_model(SPEC, released[0])

    async def run():
        encoder = RemoteEncoder(service[0], SPEC.name, model.fingerprint, dims=64, timeout_seconds=5)
        try:
            return await encoder.encode([QUESTION])
        finally:
            await encoder.aclose()

    service[1].strict = False
    with pytest.raises(ModelMismatch, match="fingerprint none"):
        asyncio.run(run())


def test_the_same_model_is_believed(service, released):
    """It embeds stored passages first, then queries, in requests that any service of OpenAI's shape takes; its vectors are the model's own."""
    url, state = service

    async def use(encoder):
        return await encoder.encode([QUESTION, "Stop an instance"]), await encoder.encode([QUESTION])

    both, again = opened(released, url, use)
    expected = load_model(SPEC, released[0]).encode_queries([QUESTION, "Stop an instance"])
    np.testing.assert_allclose(both, expected, atol=1e-6)
    np.testing.assert_array_equal(again[0], both[0])
    assert len(state.asked) == 5 + 2, "five stored passages once, each query once"


def test_another_model_is_refused(service, released):
    """A service that gives other vectors is not opened with, and the error says by how much."""
    url, state = service
    state.serves = "other"
    with pytest.raises(ModelMismatch, match=r"cosine 0\.\d+"):
        opened(released, url, lambda encoder: encoder.encode([QUESTION]))


def test_a_service_that_is_away_is_believed_once_it_is_back(service, released):
    """Opening does not wait for it; nothing of it is used before it agreed."""
    url, state = service
    state.down = True

    async def use(encoder):
        with pytest.raises(EncoderUnavailable):
            await encoder.encode([QUESTION])
        state.down = False
        return await encoder.encode([QUESTION])

    assert opened(released, url, use, breaker_failures=100).shape == (1, 64)


def test_a_change_after_a_break_is_noticed(service, released):
    """A second try may reach another process: what it gave is not used when that disagrees, and is forgotten."""
    url, state = service

    async def use(encoder):
        await encoder.encode(["first"])
        state.serves, state.cuts = "other", 1
        with pytest.raises(ModelMismatch):
            await encoder.encode(["query: second"])
        with pytest.raises(ModelMismatch):
            await encoder.encode(["first"])
        asked = len(state.asked)
        with pytest.raises(ModelMismatch):
            await encoder.encode(["first"])
        assert len(state.asked) == asked, "a service that disagreed is left alone for a while"
        state.serves = "same"
        encoder._refused_at = -np.inf  # the while is over
        return await encoder.encode(["query: second"])

    np.testing.assert_allclose(opened(released, url, use), load_model(SPEC, released[0]).encode_queries(["query: second"]), atol=1e-6)


def test_it_is_looked_at_again(service, released, monkeypatch):
    """After silence before the next query; after `probe_seconds` beside it, and from then on a change is refused."""
    url, state = service

    async def silent(encoder):
        await encoder.encode(["first"])
        monkeypatch.setattr(probed_encoder, "QUIET_SECONDS", 0.0)
        state.serves = "other"
        with pytest.raises(ModelMismatch):
            await encoder.encode(["second"])

    opened(released, url, silent)
    monkeypatch.undo()
    state.serves = "same"

    async def beside(encoder):
        await encoder.encode(["first"])
        state.serves = "other"
        encoder._agreed_at -= 31
        await encoder.encode(["first"])  # believed for the last time
        for _ in range(200):
            if encoder._agreed_at == -np.inf:
                break
            await asyncio.sleep(0.02)
        with pytest.raises(ModelMismatch):
            await encoder.encode(["first"])

    opened(released, url, beside, probe_seconds=30)


def test_prompts_are_put_before_texts_here(released, tmp_path_factory):
    """A service of that shape knows no prompts, so passages and queries arrive there with those of the model's row."""
    root = tmp_path_factory.mktemp("prompted")
    store = LocalStore(root / "store")
    settings = settings_for(root, spec=PROMPTED)
    release(store, build(store, settings))
    with nameless(root, plain=SPEC) as (url, state):
        settings = settings.model_copy(update={"encoder": EncoderClient(unnamed="probe"), "places": asking(root, url).places})
        found = opened((root, store), url, lambda encoder: encoder.encode([QUESTION]), settings=settings)
        assert [text.partition(": ")[0] for text in state.asked] == ["passage"] * 5 + ["query"]
    np.testing.assert_allclose(found, load_model(PROMPTED, root).encode_queries([QUESTION]), atol=1e-6)


def test_what_cannot_be_probed_is_said(service, released):
    """The model's row must be there, for its prompts; and probing needs an interval."""
    root, _ = released
    nobody = asking(root, service[0]).model_copy(update={"models": ()})
    with pytest.raises(ConfigError, match="no embedding model 'hashing'"):
        opened(released, service[0], lambda encoder: encoder.encode([QUESTION]), settings=nobody)
    with pytest.raises(ValidationError, match="probe_seconds"):
        EncoderClient(unnamed="probe", probe_seconds=0)


def test_serving_over_a_service_without_fingerprints(service, released):
    """With `encoder.unnamed = "probe"` answers come by meaning, /v1/release says that the service is probed; another model never serves."""
    url, state = service
    root, store = released
    with serving(asking(root, url), store) as client:
        found = client.post("/v1/query", json={"query": QUESTION}).json()
        told = client.get("/v1/release").json()
    assert (found["degraded"], told["open"]["fingerprint"]) == ([], "probed")
    assert "dense_text" in found["hits"][0]["signals"]
    state.serves = "other"
    with serving(asking(root, url), store, ready=False) as client:
        until(client, "/v1/release", holds=lambda reply: reply.json()["problem"])
        assert client.get("/v1/release").json()["problem"]["code"] == "model_mismatch"
        assert problem(client.post("/v1/query", json={"query": QUESTION}))["code"] == "not_ready"
