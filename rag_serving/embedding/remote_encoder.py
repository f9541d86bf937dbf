"""The client of the embedding service: a deadline on every call, a bounded number of second tries, a breaker, a cache.

A call never outlives the time it was given, and a reply is believed only with the snapshot's fingerprint and vectors that pass
`checked_vectors`.
"""

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass

import httpx2
import numpy as np
from pydantic import ValidationError

from rag_serving import telemetry
from rag_serving.breaker import Breaker, Budget, State
from rag_serving.deadline import Deadline
from rag_serving.embedding.embeddings_wire import DEADLINE_HEADER, MOST_TEXTS, ReceivedReply, message_of, request_body
from rag_serving.encoding import Vectors, checked_vectors
from rag_serving.errors import EncoderError, EncoderUnavailable, ModelMismatch
from rag_serving.settings import EncoderClient
from rag_serving.signals import contract
from rag_serving.telemetry import outgoing_headers

MOST_CONNECTIONS = 32
START_IT = "Start it with `ragline embedder`."
_PAUSE = 0.02  # seconds before a second try, when the service names none
_HURRY = 0.25  # a caller that grants less than this share of the usual patience says nothing about the service when it gives up
_LATENCIES = 256  # kept for the rolling p95
_BYTES_A_NUMBER = 32  # of a reply, at most; beside some room for the rest


@dataclass(slots=True)
class Traffic:
    """What an encoder did so far. `requests` are first tries; `retries` and `hedges` come on top of them."""

    cache_hits: int = 0
    cache_misses: int = 0
    requests: int = 0
    retries: int = 0
    hedges: int = 0
    failures: int = 0  # calls that the service failed
    refused: int = 0  # calls that the open breaker did not let through
    in_flight: int = 0


class _Cache:
    """The vectors of the texts used last, at most `entries`."""

    def __init__(self, entries: int) -> None:
        self._entries = entries
        self._rows: OrderedDict[tuple[str, str], Vectors] = OrderedDict()

    def known(self, fingerprint: str, texts: Sequence[str]) -> dict[str, Vectors]:
        found = {}
        for text in texts:
            row = self._rows.get((fingerprint, text))
            if row is not None:
                self._rows.move_to_end((fingerprint, text))
                found[text] = row
        return found

    def keep(self, fingerprint: str, texts: Sequence[str], vectors: Vectors) -> None:
        for text, row in zip(texts, vectors, strict=True):
            self._rows[fingerprint, text] = row.copy()  # a view would keep the whole reply
            if len(self._rows) > self._entries:
                self._rows.popitem(last=False)


class RemoteEncoder:
    """The embedding service at `base_url`, whose replies must carry `fingerprint`; one `encode` takes at most `timeout_seconds`.

    A failed connection, 429 and 503 are tried once more while the retry budget lasts; a service that keeps failing is left alone by the
    breaker. Vectors are cached by fingerprint and text. `state` and `traffic` tell how it goes.

    Connections are kept between calls and belong to the running event loop: `aclose()` before it ends; the encoder can be used again after.
    """

    def __init__(
        self, base_url: str, model: str, fingerprint: str, *, dims: int, timeout_seconds: float, client: EncoderClient | None = None
    ) -> None:
        client = client or EncoderClient()
        self.base_url = base_url.rstrip("/")
        self.model = model
        self.fingerprint = fingerprint
        self.traffic = Traffic()
        self._dims = dims
        self._timeout_seconds = timeout_seconds
        self._breaker = Breaker(
            failures=client.breaker_failures, window_seconds=client.breaker_window_seconds, open_seconds=client.breaker_open_seconds
        )
        self._retries = Budget(client.retry_share)
        self._hedges = Budget(client.hedge_share)
        self._hedging = client.hedge_share > 0
        self._latencies: deque[float] = deque(maxlen=_LATENCIES)
        self._cache = _Cache(client.cache_entries)
        self._client: httpx2.AsyncClient | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def state(self) -> State:
        """Of the breaker: closed, open or half_open."""
        return self._breaker.state

    async def encode(self, queries: Sequence[str], *, deadline: Deadline | None = None) -> Vectors:
        """EncoderUnavailable when the service is down, slow or overloaded; ModelMismatch when its vectors are not the snapshot's."""
        rows = self._cache.known(self.fingerprint, queries)
        missing = [query for query in dict.fromkeys(queries) if query not in rows]
        self.traffic.cache_hits += len(rows)
        self.traffic.cache_misses += len(missing)
        telemetry.record({contract.CACHE_HIT: not missing})
        until = Deadline.after(deadline.within(self._timeout_seconds) if deadline else self._timeout_seconds)
        for start in range(0, len(missing), MOST_TEXTS):
            group = missing[start : start + MOST_TEXTS]
            vectors = await self._guarded(group, until)
            rows.update(zip(group, vectors, strict=True))
            self._cache.keep(self.fingerprint, group, vectors)
        return np.stack([rows[query] for query in queries]) if queries else np.empty((0, self._dims), dtype=np.float32)

    async def aclose(self) -> None:
        client, self._client = self._client, None
        if client is not None and self._loop is asyncio.get_running_loop():
            await client.aclose()

    async def _guarded(self, queries: Sequence[str], until: Deadline) -> Vectors:
        """Ask through the breaker, which hears how it went."""
        with telemetry.span(contract.EMBEDDINGS, model=self.model):
            telemetry.record(
                {
                    contract.OPERATION: "embeddings",
                    contract.PROVIDER: "ragline",
                    contract.REQUEST_MODEL: self.model,
                    contract.BATCH: len(queries),
                    contract.DIMENSIONS: self._dims,
                }
            )
            return await self._through_breaker(queries, until)

    async def _through_breaker(self, queries: Sequence[str], until: Deadline) -> Vectors:
        given = self._breaker.enter()
        if given is None:
            self.traffic.refused += 1
            pause = self._breaker.retry_seconds
            raise EncoderUnavailable(f"{self._origin} failed repeatedly; it is asked again in {pause:.1f} s.", fix=START_IT)
        granted = until.remaining
        self.traffic.in_flight += 1
        try:
            async with asyncio.timeout(granted):
                vectors = await (self._hedged(queries, until) if self._hedging else self._asked(queries, until))
        except (ModelMismatch, _Refusal):
            self._breaker.succeeded(given)  # it works; what it serves is another matter
            raise
        except EncoderError:
            self._failed(given)
            raise
        except TimeoutError:
            if granted >= _HURRY * self._timeout_seconds:
                self._failed(given)
            else:
                self._breaker.abandoned(given)
            raise EncoderUnavailable(f"{self._origin} gave no answer within {granted:.3g} s.", fix=START_IT) from None
        except BaseException:
            self._breaker.abandoned(given)
            raise
        finally:
            self.traffic.in_flight -= 1
        self._breaker.succeeded(given)
        return vectors

    def _failed(self, given: int) -> None:
        self.traffic.failures += 1
        self._breaker.failed(given)

    async def _hedged(self, queries: Sequence[str], until: Deadline) -> Vectors:
        """Ask a second time when the first takes longer than the rolling p95; the first usable answer counts."""
        self._hedges.earn()
        started = time.monotonic()
        tasks = {asyncio.create_task(self._asked(queries, until))}
        try:
            done, _ = await asyncio.wait(tasks, timeout=self._p95())
            if not done and self._hedges.spend():
                self.traffic.hedges += 1
                tasks.add(asyncio.create_task(self._asked(queries, until, extra=True)))
            while True:
                done, waiting = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                good = [task for task in done if task.exception() is None]
                if good or not waiting:
                    break
                tasks = waiting
            vectors = (good or list(done))[0].result()
        finally:
            for task in tasks:
                task.cancel()
        self._latencies.append(time.monotonic() - started)
        return vectors

    def _p95(self) -> float | None:
        """Seconds; None while too few calls were timed."""
        enough = len(self._latencies) >= 20
        return sorted(self._latencies)[int(len(self._latencies) * 0.95)] if enough else None

    async def _asked(self, queries: Sequence[str], until: Deadline, *, extra: bool = False) -> Vectors:
        """One request, and a second one where that is worth it."""
        if not extra:
            self.traffic.requests += 1
            self._retries.earn()
        try:
            return await self._ask(queries, until)
        except _TryAgain as error:
            if extra or 2 * error.pause > until.remaining or not self._retries.spend():
                raise
            await asyncio.sleep(error.pause)
        self.traffic.retries += 1
        return await self._ask(queries, until)

    async def _ask(self, queries: Sequence[str], until: Deadline) -> Vectors:
        body = request_body(self.model, queries)
        headers = {"Content-Type": "application/json", DEADLINE_HEADER: str(int(until.remaining * 1000)), **outgoing_headers()}
        most = len(queries) * self._dims * _BYTES_A_NUMBER + (64 << 10)
        data = bytearray()
        try:
            async with self._pool().stream("POST", "/v1/embeddings", content=body, headers=headers) as response:
                async for piece in response.aiter_bytes():
                    data += piece
                    if len(data) > most:
                        raise EncoderError(f"{self._origin} gave more than {most} bytes.", fix="Check what runs at that address.")
        except httpx2.RequestError as error:
            raise _TryAgain(f"{self._origin} cannot be reached: {type(error).__name__} {error}.", pause=_PAUSE) from error
        return self._read(response, bytes(data), count=len(queries))

    def _pool(self) -> httpx2.AsyncClient:
        loop = asyncio.get_running_loop()
        if self._client is None or self._loop is not loop:
            limits = httpx2.Limits(max_connections=MOST_CONNECTIONS, max_keepalive_connections=MOST_CONNECTIONS, keepalive_expiry=30)
            # every use is within an asyncio.timeout, which covers waiting for a connection too
            self._client = httpx2.AsyncClient(base_url=self.base_url, timeout=None, limits=limits, trust_env=False)
            self._loop = loop
        return self._client

    def _read(self, response: httpx2.Response, data: bytes, *, count: int) -> Vectors:
        status = response.status_code
        if status in {429, 503}:
            raise _TryAgain(f"{self._origin} answered {status}: {message_of(data)}.", pause=_retry_after(response))
        if status >= 500:
            raise EncoderUnavailable(f"{self._origin} answered {status}: {message_of(data)}.", fix=START_IT)
        if status != 200:
            raise _Refusal(f"{self._origin} refused {self.model!r} with {status}: {message_of(data)}.", fix="Check its configured models.")
        try:
            reply = ReceivedReply.model_validate_json(data)
        except ValidationError as error:
            what = f"{self._origin} gave no usable reply: {error.errors()[0]['msg']}."
            raise EncoderError(what, fix="Check what runs at that address.") from None
        if reply.fingerprint != self.fingerprint:
            served = (reply.fingerprint or "none")[:12]
            raise ModelMismatch(
                f"{self._origin} serves {self.model!r} with fingerprint {served}, the snapshot needs {self.fingerprint[:12]}.",
                fix="Run the embedder with the model, prompts and dtype the snapshot was built with, or build a new snapshot.",
            )
        if [row.index for row in reply.data] != list(range(count)):
            what = f"{self._origin} gave {len(reply.data)} vectors for {count} texts, or not in order."
            raise EncoderError(what, fix="Check the service.")
        return checked_vectors([row.numbers for row in reply.data], count=count, dims=self._dims, origin=self._origin)

    @property
    def _origin(self) -> str:
        return f"the embedding service at {self.base_url}"


class _Refusal(EncoderError):
    """The service works and does not take this request."""


class _TryAgain(EncoderUnavailable):
    """A failure after which a second try, `pause` seconds later, may do."""

    def __init__(self, what: str, *, pause: float) -> None:
        super().__init__(what, fix=START_IT)
        self.pause = pause


def _retry_after(response: httpx2.Response) -> float:
    stated = response.headers.get("retry-after", "")
    return float(stated) if stated.isdecimal() and len(stated) < 6 else _PAUSE
