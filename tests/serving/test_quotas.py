"""What each key may use: requests a minute, tokens a day."""

import asyncio

import httpx2
import pytest
from small_service import release, serving, settings_for, two_snapshots

from rag_serving.edge.caller import ANONYMOUS, Caller
from rag_serving.edge.keys import create_key
from rag_serving.edge.quotas import Quotas, tokens_of
from rag_serving.errors import LimitExceeded
from rag_serving.settings import Access

ANN, BOB = Caller("ann", "a" * 12), Caller("bob", "b" * 12)
ASK = {"query": "How do I delete a bucket?"}


async def refusal(quotas: Quotas, caller: Caller) -> LimitExceeded | None:
    try:
        await quotas.check(caller)
    except LimitExceeded as error:
        return error
    return None


def test_requests_a_minute():
    """Exactly as many requests a minute as allowed are let in; the rest is told to come back within a minute. Another key is not touched."""

    async def story() -> None:
        quotas = Quotas(Access(requests_per_minute=3, burst_seconds=0))
        outcomes = [await refusal(quotas, ANN) for _ in range(5)]
        assert [error is None for error in outcomes] == [True] * 3 + [False] * 2
        assert {error.code for error in outcomes if error} == {"rate_limited"}
        assert all(1 <= error.retry_after <= 120 for error in outcomes if error)
        assert await refusal(quotas, BOB) is None

    asyncio.run(story())


def test_a_burst_is_cut():
    """A key that sends its whole minute at once gets what its rate gives in `burst_seconds`, and is told to come back in seconds."""

    async def story() -> None:
        quotas = Quotas(Access(requests_per_minute=120, burst_seconds=2))
        outcomes = [await refusal(quotas, ANN) for _ in range(50)]
        assert sum(error is None for error in outcomes) in {4, 5}  # the next two seconds may begin meanwhile
        assert {(error.code, error.retry_after <= 3) for error in outcomes if error} == {("rate_limited", True)}
        assert "4 requests in 2 seconds" in str(next(filter(None, outcomes)))
        await asyncio.sleep(4)
        assert await refusal(quotas, ANN) is None

    asyncio.run(story())


def test_tokens_a_day():
    """A key whose tokens of the day are used is refused, for a day at most; the request that crosses the line was still answered."""

    async def story() -> None:
        quotas = Quotas(Access(tokens_per_day=100))
        for tokens in (60, 60):
            assert await refusal(quotas, ANN) is None
            await quotas.spend(ANN, tokens)
        error = await refusal(quotas, ANN)
        assert error is not None
        assert error.code == "budget_exhausted"
        assert 1 <= error.retry_after <= 86_400
        assert await refusal(quotas, BOB) is None

    asyncio.run(story())


def test_zero_is_unlimited():
    """A limit of 0 limits nothing."""

    async def story() -> None:
        quotas = Quotas(Access(requests_per_minute=0, tokens_per_day=0))
        await quotas.spend(ANN, 10**9)
        assert [await refusal(quotas, ANN) for _ in range(50)] == [None] * 50

    asyncio.run(story())


def test_nobody_is_metered_without_keys():
    """Whoever asks a service that has no keys is not counted."""

    async def story() -> None:
        quotas = Quotas(Access(requests_per_minute=1, tokens_per_day=1))
        await quotas.spend(ANONYMOUS, 1000)
        assert [await refusal(quotas, ANONYMOUS) for _ in range(5)] == [None] * 5

    asyncio.run(story())


@pytest.mark.parametrize(("characters", "tokens"), [(0, 0), (1, 1), (4, 1), (5, 2), (4000, 1000)])
def test_tokens_are_fours_of_characters(characters, tokens):
    """The estimate is one token for every four characters begun."""
    assert tokens_of(characters) == tokens


@pytest.fixture
def service(tmp_path):
    """A service whose keys may send 5 requests a minute and use 40 tokens a day; and the keys of ann and bob."""
    store, manifest, _ = two_snapshots(tmp_path)
    release(store, manifest)
    keys = {name: create_key(store, name, scopes=("query", "read"), actor="tester")[0] for name in ("ann", "bob")}
    settings = settings_for(tmp_path).model_copy(update={"access": Access(requests_per_minute=5, burst_seconds=0, tokens_per_day=40)})
    with serving(settings, store) as client:
        yield client, {name: {"Authorization": f"Bearer {key}"} for name, key in keys.items()}


def refused(reply: httpx2.Response) -> str:
    assert reply.status_code == 429
    assert int(reply.headers["retry-after"]) >= 1
    return reply.json()["code"]


def test_over_http(service):
    """A key over its rate gets 429 with Retry-After, whatever it sends; the other key goes on as if nothing were."""
    client, keys = service
    assert [client.get("/v1/release", headers=keys["ann"]).status_code for _ in range(5)] == [200] * 5
    assert refused(client.get("/v1/release", headers=keys["ann"])) == "rate_limited"
    assert refused(client.post("/v1/query", content=b"no json", headers=keys["ann"])) == "rate_limited"
    assert client.get("/v1/release", headers=keys["bob"]).status_code == 200


def test_answers_cost_tokens_over_http(service):
    """Questions and the passages they bring are put on the key's account; refused and malformed ones cost nothing."""
    client, keys = service
    for _ in range(2):
        assert client.post("/v1/retrieve", json={"query": ""}, headers=keys["ann"]).status_code == 422
    assert client.post("/v1/retrieve", json=ASK, headers=keys["ann"]).status_code == 200
    assert refused(client.post("/v1/retrieve", json=ASK, headers=keys["ann"])) == "budget_exhausted"
    assert client.post("/v1/retrieve", json=ASK | {"top_k": 1}, headers=keys["bob"]).status_code == 200
    assert client.post("/v1/retrieve", json=ASK | {"top_k": 1}, headers=keys["bob"]).status_code == 200
