"""The query service below and far above what it can do: open-loop load, services in their own processes, over real sockets.

Requests come at their own moments (Poisson, seeded), however slowly the earlier ones are answered, and a latency starts at the moment at which
the request was due: what a slow service or a late sender holds up is counted, not hidden (coordinated omission).
"""

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from itertools import count

import numpy as np

from evals.bench.connections import Connections
from evals.bench.figures import Figure, kept, paired, reached
from evals.bench.processes import running
from evals.bench.released import Released, released
from evals.bench.rig import Rig
from rag_serving.app import serve
from rag_serving.collector import settle
from rag_serving.edge.keys import create_key
from rag_serving.errors import PlatformError
from rag_serving.settings import Access

MODEL = "wordllama-256"
IN_TIME_SECONDS = 3.0
PATIENCE_SECONDS = 10.0
REFUSED_MS = 50.0
GOODPUT_SHARE = 0.8
OTHERS_SLOWER = 1.2
QUOTA = 60  # requests a minute of each key, in the part about one that sends a hundred times as many
_LOADS = (0.5, 1.0, 2.0, 4.0)  # of capacity
_ROUNDS = 3
_CALLERS = 40  # each within its quota
_TURNS = 8  # with and without that key, one after another


@dataclass(frozen=True, slots=True)
class Reply:
    """What came of one request: status (0: no reply), whether it was done without a part, and seconds since it was due."""

    status: int
    degraded: bool
    seconds: float


@dataclass(slots=True)
class Stage:
    """The replies to one stretch of load, of so many seconds."""

    seconds: float
    replies: list[Reply] = field(default_factory=list)

    def seconds_of(self, *statuses: int) -> list[float]:
        return [reply.seconds for reply in self.replies if reply.status in statuses]

    @property
    def goodput(self) -> float:
        """Answers in time, a second."""
        return sum(seconds <= IN_TIME_SECONDS for seconds in self.seconds_of(200)) / self.seconds

    @property
    def errors(self) -> int:
        """Requests that were neither answered nor refused as agreed."""
        return sum(reply.status not in (200, 429, 503) for reply in self.replies)

    @property
    def degraded(self) -> float:
        answered = [reply for reply in self.replies if reply.status == 200]
        return sum(reply.degraded for reply in answered) / max(1, len(answered))

    def told(self) -> str:
        statuses = Counter(reply.status for reply in self.replies)
        return f"{dict(sorted(statuses.items()))}, {self.errors} errors, {self.degraded:.0%} of answers degraded"


def percentile_ms(seconds: Sequence[float], at: float) -> float:
    return float(np.percentile(seconds, at)) * 1000 if seconds else float("nan")


def due_times(rate: float, seconds: float, *, seed: int) -> Iterator[float]:
    """Moments of a Poisson process of `rate` a second, up to `seconds`."""
    chance, at = random.Random(seed), 0.0  # noqa: S311 - drawn, not secret
    while (at := at + chance.expovariate(rate)) < seconds:
        yield at


class Client:
    """Who asks the query service, and waits PATIENCE_SECONDS at most."""

    def __init__(self, url: str) -> None:
        self._connections = Connections(url)

    async def ask(self, query: str, *, key: str = "", due: float) -> Reply:
        """One question to /v1/query; `due` is the moment (perf_counter) from which its latency counts."""
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                status, body = await self._connections.post("/v1/query", json.dumps({"query": query}).encode(), key=key)
        except (OSError, EOFError, TimeoutError, ValueError):
            status, body = 0, b""
        return Reply(status, status == 200 and b'"degraded":[]' not in body, time.perf_counter() - due)

    async def aclose(self) -> None:
        await self._connections.aclose()


class Load:
    """Questions without end, each asked once, so that no cache answers them."""

    def __init__(self, client: Client, queries: Sequence[str]) -> None:
        self._client = client
        self._queries = queries
        self._number = count()

    def _next(self) -> str:
        number = next(self._number)
        return f"{self._queries[number % len(self._queries)]} {number}"

    async def capacity(self, *, clients: int, seconds: float) -> float:
        """Answers a second of so many clients that each ask again as soon as they are answered, or a while after a refusal."""
        ends, stage = time.perf_counter() + seconds, Stage(seconds)

        async def client() -> None:
            while time.perf_counter() < ends:
                reply = await self._client.ask(self._next(), due=time.perf_counter())
                stage.replies.append(reply)
                if reply.status != 200:
                    await asyncio.sleep(0.2)

        await asyncio.gather(*(client() for _ in range(clients)))
        return len(stage.seconds_of(200)) / seconds

    async def offered(self, rate: float, seconds: float, *, seed: int, keys: Sequence[str] = ("",)) -> Stage:
        """What came of `rate` requests a second, dealt out to the keys in turn."""
        stage, started, asked = Stage(seconds), time.perf_counter(), []

        async def one(due: float, key: str) -> None:
            stage.replies.append(await self._client.ask(self._next(), key=key, due=due))

        for number, at in enumerate(due_times(rate, seconds, seed=seed)):
            await asyncio.sleep(max(0.0, started + at - time.perf_counter()))
            asked.append(asyncio.create_task(one(started + at, keys[number % len(keys)])))
        await asyncio.gather(*asked)
        return stage


async def run(rig: Rig, *, model: str = MODEL, seconds: float = 8.0) -> list[Figure]:
    """Goodput, latency and refusals at 0.5, 1, 2 and 4 times capacity; then one key far over its quota beside others."""
    async with released(rig, model) as ready:
        capacity, figures = await _over_capacity(rig, ready, seconds=seconds)
        return figures + await _one_greedy_key(rig, ready, rate=capacity / 4, seconds=seconds)


async def _over_capacity(rig: Rig, ready: Released, *, seconds: float) -> tuple[float, list[Figure]]:
    settings = ready.settings
    async with running(serve, settings) as url, _load(url, ready.queries) as load:
        await load.capacity(clients=settings.admission.concurrency, seconds=min(3.0, seconds))
        rounds = [
            await _round(rig, load, clients=settings.admission.concurrency, seconds=seconds, number=number) for number in range(_ROUNDS)
        ]
        capacity = float(np.median([each.capacity for each in rounds]))
        after = await load.offered(0.5 * capacity, seconds / 2, seed=9)
    figures = [Figure("capacity, closed loop", capacity, "answers/s", note=f"{settings.admission.concurrency} clients")]
    for times in _LOADS:
        stages = [each.stages[times] for each in rounds]
        whole = _together(stages)
        goodput = float(np.median([stage.goodput for stage in stages]))
        figures.append(Figure(f"{times:g}x: answers in time", goodput, "answers/s", note=whole.told()))
        figures += _latency(f"{times:g}x: answered, p99", whole.seconds_of(200), promise_ms=IN_TIME_SECONDS * 1000)
        figures += _latency(f"{times:g}x: refused, p99", whole.seconds_of(503), promise_ms=REFUSED_MS)
    most = max(_LOADS)
    far_over, peaks = [each.stages[most].goodput for each in rounds], [each.peak for each in rounds]
    share = paired(f"{most:g}x: answers in time, of the peak", far_over, peaks, "answers/s", peer_is="the best load of its round")
    figures.append(replace(share, promise=reached(share.ratio or 0, GOODPUT_SHARE)))
    return capacity, figures + _latency("0.5x after that: answered, p99", after.seconds_of(200), note=after.told())


@dataclass(frozen=True, slots=True)
class _Round:
    """All loads one after another, so that a machine that is quicker now than a minute later is so for each of them."""

    capacity: float
    stages: dict[float, Stage]

    @property
    def peak(self) -> float:
        return max(self.capacity, *(stage.goodput for stage in self.stages.values()))


async def _round(rig: Rig, load: Load, *, clients: int, seconds: float, number: int) -> _Round:
    capacity = await load.capacity(clients=clients, seconds=seconds)
    if not capacity:
        raise PlatformError("the query service of the bench answered nothing.", fix="Run `ragline serve` to see why.")
    stages = {}
    for times in _LOADS:
        rig.reporter.note(f"round {number + 1} of {_ROUNDS}, {times:g}x capacity: {times * capacity:.0f} requests/s for {seconds:g} s")
        stages[times] = await load.offered(times * capacity, seconds, seed=10 * number + round(2 * times))
        await asyncio.sleep(1.0)
    return _Round(capacity, stages)


def _latency(what: str, seconds: Sequence[float], *, promise_ms: float | None = None, note: str = "") -> list[Figure]:
    """The 99th percentile, with the median in its note; nothing of no requests."""
    if not seconds:
        return []
    p99, p50 = percentile_ms(seconds, 99), percentile_ms(seconds, 50)
    promise = "" if promise_ms is None else kept(p99, promise_ms, "ms")
    return [Figure(what, p99, "ms", promise=promise, note="; ".join(part for part in (f"p50 {p50:.1f} ms", note) if part))]


async def _one_greedy_key(rig: Rig, ready: Released, *, rate: float, seconds: float) -> list[Figure]:
    """What other keys, with `rate` requests a second together, notice of one that sends a hundred times its quota.

    In turns with and without it, in which the others ask at the same moments.
    """
    greedy_key, *keys = (create_key(ready.store, f"caller-{number}", scopes=("query",), actor="bench")[0] for number in range(1 + _CALLERS))
    settings = ready.settings.model_copy(update={"access": Access(requests_per_minute=QUOTA)})
    async with running(serve, settings) as url, _load(url, ready.queries) as load:
        rig.reporter.note(f"{_CALLERS} keys with {rate:.0f} requests/s together, without and with one at 100 times its quota")
        await load.offered(rate, 2.0, seed=10, keys=keys)
        alone, beside, greedy = [], [], []
        for turn in range(_TURNS):
            alone.append(await load.offered(rate, seconds, seed=20 + turn, keys=keys))
            theirs, its = await asyncio.gather(
                load.offered(rate, seconds, seed=20 + turn, keys=keys),
                load.offered(100 * QUOTA / 60, seconds, seed=40 + turn, keys=[greedy_key]),
            )
            beside.append(theirs)
            greedy.append(its)
    refused = _together(greedy)
    figures = _latency("the greedy key: refused, p99", refused.seconds_of(429, 503), promise_ms=REFUSED_MS, note=refused.told())
    with_it, before = ([percentile_ms(stage.seconds_of(200), 99) for stage in side] for side in (beside, alone))
    whole = [percentile_ms(_together(side).seconds_of(200), 99) for side in (beside, alone)]
    note = f"of all turns together {whole[0]:.0f} and {whole[1]:.0f} ms; {_together(beside).told()}"
    others = paired("other keys beside a greedy one, p99", with_it, before, "ms", peer_is="the same turn without it", note=note)
    return [*figures, replace(others, promise=kept(others.ratio or 0, OTHERS_SLOWER, "x"))]


def _together(stages: Sequence[Stage]) -> Stage:
    return Stage(sum(stage.seconds for stage in stages), [reply for stage in stages for reply in stage.replies])


@asynccontextmanager
async def _load(url: str, queries: Sequence[str]) -> AsyncIterator[Load]:
    client = Client(url)
    settle()  # a full collection here, over all that the bench has loaded, would be counted as the service's own
    try:
        yield Load(client, queries)
    finally:
        await client.aclose()
