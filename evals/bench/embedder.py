"""The embedding service, in its own process and over a real socket, against the bare model in this one."""

import asyncio
import logging
import multiprocessing
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx2
import numpy as np

from evals.bench.figures import Figure, alternate
from evals.bench.rig import Rig
from rag_assets import steps
from rag_serving.embedder import serve
from rag_serving.encoding import RemoteEncoder
from rag_serving.errors import EncoderUnavailable
from rag_serving.settings import Settings

_HOST = "127.0.0.1"
_START_SECONDS = 120


async def run(rig: Rig, *, texts: int = 384, clients: int = 16, rounds: int = 5, singles: int = 60) -> list[Figure]:
    """Texts a second of concurrent clients that send one query a request, and the latency of one request alone."""
    await asyncio.to_thread(rig.chunk_texts)
    queries = [query.text for query in steps.load_eval_set(rig.workbench).queries[:texts]]
    size = rig.best_batch_size(queries)
    model = rig.model
    prompted = [model.spec.query_prompt + query for query in queries]
    rig.reporter.note("starting the embedding service")
    async with _service(rig.settings, rig.model_name) as url:
        remotes = [RemoteEncoder(url, rig.model_name, model.fingerprint, dims=model.dims, timeout_seconds=60) for _ in range(clients)]

        rig.check_same(await remotes[0].encode(queries[:32]), rig.bare_encode(prompted[:32], batch_size=size))

        async def together(_: int) -> None:
            waiting = iter(queries)

            async def client(remote: RemoteEncoder) -> None:
                for query in waiting:
                    await remote.encode([query])

            await asyncio.gather(*(client(remote) for remote in remotes))

        rig.reporter.note(f"{clients} clients, {len(queries)} queries, {rounds} rounds; then {singles} requests one at a time")
        loaded = await alternate(together, lambda _: rig.bare_encode(prompted, batch_size=size), rounds=rounds)
        alone = await alternate(
            lambda number: remotes[0].encode([queries[number % len(queries)]]),
            lambda number: rig.bare_encode([prompted[number % len(queries)]], batch_size=1),
            rounds=singles,
            warm_up=min(5, singles),
        )
        for remote in remotes:
            await remote.aclose()
    added = float(np.median((np.asarray(alone.ours) - np.asarray(alone.peer)) * 1000))
    note = f"{rig.model_name}, {model.dtype}, {len(queries)} queries, one a request"
    return [
        loaded.rate(
            f"{clients} concurrent clients", len(queries), "texts/s", peer_is=f"SentenceTransformer.encode, batch {size}", note=note
        ),
        alone.milliseconds("one request alone, p50", peer_is="SentenceTransformer.encode of one text"),
        Figure("added to one request, p50", added, "ms", note="of the differences request by request"),
    ]


def _start(settings: Settings, model_name: str, port: int) -> None:
    logging.disable(logging.INFO)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # uvicorn raises the signal again when it has ended
    serve(settings, models=[model_name], host=_HOST, port=port)


@asynccontextmanager
async def _service(settings: Settings, model_name: str) -> AsyncIterator[str]:
    """The address of a ready service, which ends with the `async with`; EncoderUnavailable when it does not get ready."""
    with socket.socket() as free:
        free.bind((_HOST, 0))
        port = free.getsockname()[1]
    process = multiprocessing.get_context("spawn").Process(target=_start, args=(settings, model_name, port), daemon=True)
    process.start()
    url = f"http://{_HOST}:{port}"
    try:
        async with httpx2.AsyncClient(base_url=url, trust_env=False, timeout=10) as client:
            await _until_ready(client, process)
        yield url
    finally:
        process.terminate()
        await asyncio.to_thread(process.join)


async def _until_ready(client: httpx2.AsyncClient, process: multiprocessing.process.BaseProcess) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while process.is_alive() and time.monotonic() < deadline:
        try:
            if (await client.get("/readyz")).status_code == 200:
                return
        except httpx2.TransportError:
            pass
        await asyncio.sleep(0.1)
    raise EncoderUnavailable("the embedding service of the bench did not get ready.", fix="Run `ragline embedder` to see why.")
