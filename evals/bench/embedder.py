"""The embedding service, in its own process and over a real socket, against the bare model in this one."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from evals.bench.figures import Figure, alternate, kept
from evals.bench.processes import running
from evals.bench.rig import Rig
from rag_assets import steps
from rag_serving.embedder import serve
from rag_serving.embedding.remote_encoder import RemoteEncoder
from rag_serving.settings import EncoderClient

SHARE = 0.9  # of the bare model's throughput at its best batch size, at least
ADDED_MS = 3.0  # to the bare model's latency, at most


async def run(rig: Rig, *, texts: int = 384, clients: int = 16, rounds: int = 5, singles: int = 60) -> list[Figure]:
    """Texts a second of concurrent clients that send one query a request, and the latency of one request alone; no vector is cached.

    The service can be quicker than its peer: it computes queries without padding, which `SentenceTransformer.encode` does not.
    """
    await asyncio.to_thread(rig.chunk_texts)
    queries = [query.text for query in steps.load_eval_set(rig.workbench).queries[:texts]]
    size = rig.best_batch_size(queries)
    model = rig.model
    prompted = [model.spec.query_prompt + query for query in queries]
    rig.reporter.note("starting the embedding service")
    async with running(serve, rig.settings, models=[rig.model_name]) as url:
        uncached = EncoderClient(cache_entries=0)
        remotes = [
            RemoteEncoder(url, rig.model_name, model.fingerprint, dims=model.dims, timeout_seconds=60, client=uncached)
            for _ in range(clients)
        ]
        rig.check_same(await remotes[0].encode(queries[:32]), rig.bare_encode(prompted[:32], batch_size=size))
        rig.reporter.note(f"{clients} clients, {len(queries)} queries, {rounds} rounds; then {singles} requests one at a time")
        loaded = await alternate(lambda _: _together(remotes, queries), lambda _: rig.bare_encode(prompted, batch_size=size), rounds=rounds)
        alone = await alternate(
            lambda number: remotes[0].encode([queries[number % len(queries)]]),
            lambda number: rig.bare_encode([prompted[number % len(queries)]], batch_size=1),
            rounds=singles,
            warm_up=min(5, singles),
        )
        for remote in remotes:
            await remote.aclose()
    note = f"{rig.model_name}, {model.dtype}, {len(queries)} queries, one a request"
    rate = loaded.rate(
        f"{clients} concurrent clients",
        len(queries),
        "texts/s",
        peer_is=f"SentenceTransformer.encode, batch {size}",
        limit=False,
        note=note,
    )
    share = rate.ratio or 0.0
    added = float(np.median((np.asarray(alone.ours) - np.asarray(alone.peer)) * 1000))
    return [
        replace(rate, promise=f">= {SHARE:g} of the peer: {'kept' if share >= SHARE else 'missed'}"),
        alone.milliseconds("one request alone, p50", peer_is="SentenceTransformer.encode of one text", limit=False),
        Figure("added to one request, p50", added, "ms", promise=kept(added, ADDED_MS, "ms"), note="of the differences request by request"),
    ]


async def _together(remotes: Sequence[RemoteEncoder], queries: Sequence[str]) -> None:
    """Every query once, by as many clients as there are encoders, each with one request under way."""
    waiting = iter(queries)

    async def client(remote: RemoteEncoder) -> None:
        for query in waiting:
            await remote.encode([query])

    await asyncio.gather(*(client(remote) for remote in remotes))
