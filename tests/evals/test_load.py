"""The load generator: requests come when they are due, and what a slow service holds up is counted."""

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from evals.bench.load import Client, Load, Reply, Stage, due_times, percentile_ms


class Service:
    """An HTTP service that answers each question with `reply`, after standing still until `stands_until` (perf_counter)."""

    def __init__(self) -> None:
        self.reply = (200, b'{"degraded":[]}')
        self.stands_until = 0.0
        self.asked: list[dict] = []
        self.keys: list[str] = []
        self.connections = 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                fields = dict(line.split(": ", 1) for line in head.splitlines()[1:] if line)
                self.asked.append(json.loads(await reader.readexactly(int(fields["Content-Length"]))))
                self.keys.append(fields.get("Authorization", ""))
                await asyncio.sleep(max(0.0, self.stands_until - time.perf_counter()))
                status, body = self.reply
                writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()


@asynccontextmanager
async def answered_by(service: Service) -> AsyncIterator[Client]:
    async with await asyncio.start_server(service, "127.0.0.1", 0) as server:
        client = Client(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        yield client
        await client.aclose()


@pytest.mark.parametrize("rate", [5.0, 300.0])
def test_moments_are_a_poisson_process(rate):
    """Moments come at the asked rate, in order, the same for the same seed, and with gaps that vary as those of a Poisson process do."""
    times = list(due_times(rate, 200.0, seed=1))
    assert times == list(due_times(rate, 200.0, seed=1)) == sorted(times)
    assert len(times) == pytest.approx(rate * 200, rel=0.15)
    gaps = [after - before for before, after in itertools.pairwise(times)]
    mean = sum(gaps) / len(gaps)
    assert sum((gap - mean) ** 2 for gap in gaps) / len(gaps) == pytest.approx(mean**2, rel=0.3)


def test_a_stall_is_counted_for_all_that_were_due():
    """While a service stands still, requests go on to come; each counts the time since it was due, so the stall shows in all of them."""

    async def story() -> tuple[Stage, Service]:
        service = Service()
        async with answered_by(service) as client:
            service.stands_until = time.perf_counter() + 1.0
            return await Load(client, ["a"]).offered(100, 0.5, seed=1), service

    stage, service = asyncio.run(story())
    due = list(due_times(100, 0.5, seed=1))
    assert len(stage.replies) == len(service.asked) == len(due)
    assert min(stage.seconds_of(200)) >= 1.0 - max(due) - 0.05
    assert max(stage.seconds_of(200)) >= 1.0 - min(due) - 0.05
    assert service.connections == len(due)


def test_every_question_is_asked_once_with_its_key():
    """No two questions are the same, and keys take turns."""

    async def story() -> Service:
        service = Service()
        async with answered_by(service) as client:
            load = Load(client, ["how", "why"])
            await load.capacity(clients=2, seconds=0.1)
            await load.offered(200, 0.2, seed=1, keys=["k1", "k2"])
        return service

    service = asyncio.run(story())
    questions = [each["query"] for each in service.asked]
    assert len(set(questions)) == len(questions)
    keyed = [key for key in service.keys if key]
    assert {key: abs(keyed.count(key) - len(keyed) / 2) <= 1 for key in set(keyed)} == {"Bearer k1": True, "Bearer k2": True}


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ((200, b'{"degraded":[]}'), (200, False)),
        ((200, b'{"degraded":["embedding"]}'), (200, True)),
        ((503, b"{}"), (503, False)),
        ((429, b"{}"), (429, False)),
    ],
)
def test_a_reply_is_told_as_it_was(reply, expected):
    """Status and degradation are those of the reply; kept connections are used again."""

    async def story() -> tuple[list[Reply], int]:
        service = Service()
        service.reply = reply
        async with answered_by(service) as client:
            return [await client.ask("a", due=time.perf_counter()) for _ in range(3)], service.connections

    replies, connections = asyncio.run(story())
    assert [(each.status, each.degraded) for each in replies] == [expected] * 3
    assert connections == 1


def test_no_service_is_an_error():
    """Where nobody listens, the reply is status 0 and counts as an error."""
    reply = asyncio.run(Client("http://127.0.0.1:9").ask("a", due=time.perf_counter()))
    stage = Stage(1.0, [reply])
    assert (reply.status, stage.errors, stage.goodput) == (0, 1, 0.0)


def test_goodput_is_answers_in_time():
    """Late answers and refusals are no goodput; refusals are no errors."""
    replies = [Reply(200, False, 0.1), Reply(200, True, 2.9), Reply(200, False, 3.1), Reply(503, False, 0.01), Reply(429, False, 0.01)]
    stage = Stage(2.0, [*replies, Reply(500, False, 0.1)])
    assert (stage.goodput, stage.errors, stage.degraded) == (1.0, 1, 1 / 3)
    assert percentile_ms(stage.seconds_of(429, 503), 50) == pytest.approx(10)
