"""What one /v1/retrieve costs beside the embedding service and LanceDB: HTTP, the edge, fusion, telemetry and the reply."""

import asyncio
import json
from time import perf_counter

import numpy as np

from evals.bench.connections import Connections
from evals.bench.figures import Figure, kept
from evals.bench.processes import running
from evals.bench.released import released
from evals.bench.retrieval import own_work
from evals.bench.rig import Rig
from rag_serving.app import serve
from rag_serving.errors import PlatformError

MODEL = "wordllama-256"
OWN_MS = 3.0


async def run(rig: Rig, *, model: str = MODEL, requests: int = 200) -> list[Figure]:
    """Requests one at a time from a client that does next to nothing, each with a new query, so that no cache has its vector.

    Ours is what the client waits beside the phases encode and retrieve, and what retrieve does when its searches take no time.
    """
    async with released(rig, model) as ready, running(serve, ready.settings) as url:
        queries = [f"{ready.queries[at % len(ready.queries)]} {at}" for at in range(requests + 20)]
        asked = Connections(url)
        rig.reporter.note(f"{requests} requests to /v1/retrieve, one at a time")
        spent = np.array([await _one(asked, query) for query in queries])[20:]
        await asked.aclose()
        snapshot_id = ready.snapshot_id
        vectors = await asyncio.to_thread(rig.workbench.model(model).encode_queries, queries)
        inside = float(np.median(await own_work(ready.store, snapshot_id, queries, vectors)))
    whole, encode, retrieve = (float(middle) for middle in np.median(spent, axis=0))
    outside = float(np.median(spent[:, 0] - spent[:, 1] - spent[:, 2]))
    own = outside + inside
    return [
        Figure(
            "own part of /v1/retrieve, p50", own, "ms", promise=kept(own, OWN_MS, "ms"), note=f"{inside:.2f} ms of it in the phase retrieve"
        ),
        Figure("the whole of it, p50", whole, "ms", note=f"encode {encode:.1f} ms, retrieve {retrieve:.1f} ms; {model}"),
    ]


async def _one(asked: Connections, query: str) -> tuple[float, float, float]:
    """Milliseconds: all that the client waits, and the phases encode and retrieve."""
    started = perf_counter()
    status, body = await asked.post("/v1/retrieve", json.dumps({"query": query}).encode())
    whole = 1000 * (perf_counter() - started)
    if status != 200:
        raise PlatformError(f"the query service of the bench answered {status}.", fix="Run `ragline serve` to see why.")
    timings = json.loads(body)["timings_ms"]
    return whole, timings["encode"], timings["retrieve"]
