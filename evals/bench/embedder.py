"""The embedding service, in its own process and over a real socket, against the bare model in this one."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

import numpy as np

from evals.bench.connections import Connections
from evals.bench.figures import Figure, alternate, kept, reached
from evals.bench.processes import running
from evals.bench.rig import Rig
from rag_assets import steps
from rag_serving.embedder import serve
from rag_serving.embedding.embeddings_wire import request_body
from rag_serving.embedding.remote_encoder import RemoteEncoder
from rag_serving.errors import PlatformError
from rag_serving.settings import EncoderClient

SHARE = 0.9  # of the bare model's throughput at its best batch size, at least
ADDED_MS = 3.0  # to the bare model's latency, at most


async def run(rig: Rig, *, texts: int = 384, clients: int = 16, rounds: int = 7, singles: int = 60) -> list[Figure]:
    """Texts a second of concurrent clients that send one query a request, and the latency of one request alone; no vector is cached.

    Clients share the cores with the service. Those of the first figure do next to nothing, so that it is about the service; those of the second
    are the ones that the query service has. The service can be quicker than its peer: it computes queries without padding, which
    `SentenceTransformer.encode` does not.
    """
    await asyncio.to_thread(rig.chunk_texts)
    queries = [query.text for query in steps.load_eval_set(rig.workbench).queries[:texts]]
    size = rig.best_batch_size(queries)
    model = rig.model
    prompted = [model.spec.query_prompt + query for query in queries]
    rig.reporter.note("starting the embedding service")
    async with running(serve, rig.settings, models=[rig.model_name]) as url:
        plain, uncached = Connections(url), EncoderClient(cache_entries=0)
        remote = RemoteEncoder(url, rig.model_name, model.fingerprint, dims=model.dims, timeout_seconds=60, client=uncached)

        async def posted(query: str) -> None:
            status, _ = await plain.post("/v1/embeddings", request_body(rig.model_name, [query]))
            if status != 200:
                raise PlatformError(f"the embedding service of the bench answered {status}.", fix="Run `ragline embedder` to see why.")

        async def encoded(query: str) -> None:
            await remote.encode([query])

        def bare(_: int) -> None:
            rig.bare_encode(prompted, batch_size=size)

        rig.check_same(await remote.encode(queries[:32]), rig.bare_encode(prompted[:32], batch_size=size))
        rig.reporter.note(f"{clients} clients, {len(queries)} queries, {rounds} rounds; then {singles} requests one at a time")
        loaded = await alternate(lambda _: _together(posted, queries, clients=clients), bare, rounds=rounds)
        through = await alternate(lambda _: _together(encoded, queries, clients=clients), bare, rounds=rounds)
        alone = await alternate(
            lambda number: encoded(queries[number % len(queries)]),
            lambda number: rig.bare_encode([prompted[number % len(queries)]], batch_size=1),
            rounds=singles,
            warm_up=min(5, singles),
        )
        await remote.aclose()
        await plain.aclose()
    note = f"{rig.model_name}, {model.dtype}, {len(queries)} queries, one a request"
    peer_is = f"SentenceTransformer.encode, batch {size}"
    rate = loaded.rate(f"{clients} concurrent clients", len(queries), "texts/s", peer_is=peer_is, limit=False, note=note)
    added = float(np.median((np.asarray(alone.ours) - np.asarray(alone.peer)) * 1000))
    return [
        replace(rate, promise=reached(rate.ratio or 0, SHARE, "of the peer")),
        through.rate(f"{clients} through the client of the query service", len(queries), "texts/s", peer_is=peer_is, limit=False),
        alone.milliseconds("one request alone, p50", peer_is="SentenceTransformer.encode of one text", limit=False),
        Figure("added to one request, p50", added, "ms", promise=kept(added, ADDED_MS, "ms"), note="of the differences request by request"),
    ]


async def _together(ask: Callable[[str], Awaitable[None]], queries: Sequence[str], *, clients: int) -> None:
    """Every query once, by so many clients, each with one request under way."""
    waiting = iter(queries)

    async def client() -> None:
        for query in waiting:
            await ask(query)

    await asyncio.gather(*(client() for _ in range(clients)))
