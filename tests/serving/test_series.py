"""However varied requests are, the series of /metrics are those of the contract: bounded in number, and without a word of anybody."""

import asyncio
import random
import secrets
import time
from collections import Counter

import httpx2
import pytest
from live_server import running
from prometheus_client.parser import text_string_to_metric_families
from small_service import PAGES, build, embedding, release, settings_for

from rag_serving import app
from rag_serving.edge.caller import SCOPES
from rag_serving.edge.keys import create_key
from rag_serving.settings import Access, Admission, Index
from rag_serving.signals.contract import METRICS, OTHER
from rag_serving.store import LocalStore

MOST_SERIES = 1500
CLIENTS = 16
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS")
ROUTES = ("/v1/query", "/v1/retrieve", "/v1/chat/completions", "/v1/feedback", "/v1/compare", "/v1/release", "/v1/models", "/readyz", "/")
MARK = "zq" + secrets.token_hex(6)  # stands in whatever a request of this test makes up


def varied(rng: random.Random, number: int, keys: list[str]) -> dict:
    """A request like no other: its arguments for `AsyncClient.request`."""
    word = f"{MARK}{number}"
    path = rng.choice([*ROUTES, *ROUTES, f"/{word}", f"/v1/{word}", f"/v1/query/{word}", f"/static/{word}.js", f"/%2e%2e/{word}"])
    question = f"{rng.choice(['delete a bucket', 'create a user', 'stop it'])} {word}"
    body = rng.choice(
        [
            {"query": question, "top_k": rng.randint(1, 60)},
            {"query": question, "filter": {"service": {"eq": word}}},
            {"query": question, "filter": {word: {"eq": 1}}},
            {"query": question, word: word},
            {"query": question, "model": word},
            {"query": question, "deadline_ms": rng.randint(50, 500)},
            {"messages": [{"role": "user", "content": question}], "model": word},
            {"query": question, "verdict": rng.choice(["up", "down", word]), "snapshot_id": word},
            [word],
        ]
    )
    headers = {
        "Authorization": f"Bearer {rng.choice([*keys, word])}",
        "User-Agent": word,
        "X-Request-Id": word,
        "X-Conversation-Id": word,
        "traceparent": rng.choice([word, f"00-{rng.randbytes(16).hex()}-{rng.randbytes(8).hex()}-01"]),
        "baggage": f"{word}={word}",
        "Accept": rng.choice(["application/json", "text/event-stream", f"text/{word}"]),
        f"X-{word}": word,
    }
    method = rng.choice(METHODS) if rng.random() < 0.1 else "POST"
    return {"method": method, "url": path, "params": {word: word}, "headers": headers, "json": body}


async def asked(url: str, requests: list[dict]) -> Counter[int]:
    """Send them all, several at a time; how often each status came."""
    statuses: Counter[int] = Counter()
    waiting = iter(requests)
    async with httpx2.AsyncClient(base_url=url, trust_env=False, timeout=60) as client:

        async def ask() -> None:
            for request in waiting:
                statuses[(await client.request(**request)).status_code] += 1

        await asyncio.gather(*(ask() for _ in range(CLIENTS)))
    return statuses


def series_after(root, count: int, *, seed: int) -> tuple[list[str], list, list[str], Counter[int]]:
    """So many varied requests to a service with keys, and as many to its embedding service: series of both, samples, texts, statuses."""
    settings = settings_for(root).model_copy(update={"index": Index(filters={"service": "text"})})
    store = LocalStore(root / "store")
    release(store, build(store, settings, PAGES))
    keys = [create_key(store, f"key-{MARK}-{number}", scopes=SCOPES, actor="tester")[0] for number in range(8)]
    rng = random.Random(seed)  # noqa: S311 - a variety of requests, no secret
    requests = [varied(rng, number, keys) for number in range(count)]
    texts = []
    with embedding(settings) as vectors:
        chosen = settings.model_copy(
            update={
                "places": settings.places.model_copy(update={"embedder_url": vectors}),
                "access": Access(requests_per_minute=0, tokens_per_day=0),
                "admission": Admission(concurrency=8, queue=64),
            }
        )
        with running(app.create_app(chosen, store=store), ready_path="/readyz") as url:
            statuses = asyncio.run(asked(url, requests))
            texts.append(httpx2.get(f"{url}/metrics", headers={"Authorization": f"Bearer {keys[0]}"}, trust_env=False).text)
        of_vectors = [
            {**request, "url": rng.choice(["/v1/embeddings", "/v1/rerank", "/v1/token_embeddings", "/v1/models", request["url"]])}
            | {"json": {"model": rng.choice(["hashing", "hashing", f"{MARK}"]), "input": [f"{MARK} {number}"]}}
            for number, request in enumerate(requests[:: 1 if count < 1000 else 10])
        ]
        asyncio.run(asked(vectors, of_vectors))
        texts.append(httpx2.get(f"{vectors}/metrics", trust_env=False).text)
    samples = [sample for text in texts for family in text_string_to_metric_families(text) for sample in family.samples]
    counted = [[line for line in text.splitlines() if line and not line.startswith("#")] for text in texts]
    return max(counted, key=len), samples, texts, statuses


def holds(root, count: int, *, seed: int) -> None:
    started = time.monotonic()
    series, samples, texts, statuses = series_after(root, count, seed=seed)
    print(f"{count:,} requests in {time.monotonic() - started:.0f} s: at most {len(series):,} series a process; statuses {dict(statuses)}")
    assert sum(statuses.values()) == count
    assert statuses[200] > count / 20
    assert statuses[404] > count / 20
    assert not [status for status in statuses if status == 500]
    assert len(series) <= MOST_SERIES
    assert not [line for text in texts for line in text.splitlines() if MARK in line]
    declared = {metric.name.removesuffix("_total"): metric for metric in METRICS}
    labelled = [sample for sample in samples if set(sample.labels) - {"le"}]
    assert labelled
    for sample in labelled:
        name = next(name for name in (sample.name, *(sample.name.rpartition("_")[0],)) if name in declared)
        allowed = {label.name: {*label.values, OTHER} for label in declared[name].labels}
        assert all(value in allowed[label] for label, value in sample.labels.items() if label != "le"), sample


def test_varied_requests_make_no_series(tmp_path):
    """200 requests with words of their own in address, key, filter, model, body and headers make no series with one of these words.

    Every label has a declared value, and no process has more than 1,500 series.
    """
    holds(tmp_path, 200, seed=7)


@pytest.mark.heavy
@pytest.mark.timeout(900)
def test_ten_thousand_varied_requests_make_no_series(tmp_path):
    """The same of 10,000 requests."""
    holds(tmp_path, 10_000, seed=11)
