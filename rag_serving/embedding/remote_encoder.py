"""The client of the embedding service: a deadline on every call, a bounded number of second tries, a breaker, a cache.

A call never outlives the time it was given, and a reply is believed only with the snapshot's fingerprint and vectors that pass
`checked_vectors`.
"""

import asyncio
import re
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Self

import numpy as np
from pydantic import ValidationError

from rag_serving import telemetry
from rag_serving.breaker import Breaker, Budget, State
from rag_serving.connections import Pool, Reply, TooLong, Unreachable
from rag_serving.deadline import Deadline
from rag_serving.embedding.embeddings_wire import DEADLINE_HEADER, MOST_TEXTS, ReceivedReply, code_of, request_body
from rag_serving.encoding import Vectors, checked_vectors
from rag_serving.errors import EncoderError, EncoderUnavailable, ModelMismatch
from rag_serving.settings import EncoderClient
from rag_serving.signals import contract, trace

START_IT = "Start it with `ragline embedder`."
_PAUSE = 0.02  # seconds before a second try, when the service names none
_HURRY = 0.25  # a caller that grants less than this share of the usual patience says nothing about the service when it gives up
_HEX = re.compile(r"[0-9a-f]{12,}")
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

    def recent(self, fingerprint: str, most: int) -> list[tuple[str, Vectors]]:
        newest = islice(reversed(self._rows.items()), most)
        return [(text, row) for (of, text), row in newest if of == fingerprint]

    def keep(self, fingerprint: str, texts: Sequence[str], vectors: Vectors) -> None:
        for text, row in zip(texts, vectors, strict=True):
            self._rows[fingerprint, text] = row.copy()  # a view would keep the whole reply
            if len(self._rows) > self._entries:
                self._rows.popitem(last=False)


class RemoteEncoder:
    """The embedding service at `base_url`, whose replies must carry `fingerprint`; one `encode` takes at most `timeout_seconds`.

    A failed connection, 429 and 503 are tried once more while the retry budget lasts; a service that keeps failing is left alone by the
    breaker. Vectors are cached by fingerprint and text. `state` and `traffic` tell how it goes. With `unnamed` a reply may lack a fingerprint,
    and texts go out as they are, without a prompt: for `ProbedEncoder`, which looks at the vectors instead.

    Connections are kept between calls and belong to the running event loop: `aclose()` before it ends; the encoder can be used again after.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        fingerprint: str,
        *,
        dims: int,
        timeout_seconds: float,
        client: EncoderClient | None = None,
        unnamed: bool = False,
    ) -> None:
        client = client or EncoderClient()
        self.base_url = base_url.rstrip("/")
        self.model = model
        self.fingerprint = fingerprint
        self.traffic = Traffic()
        self._dims = dims
        self._timeout_seconds = timeout_seconds
        self._unnamed = unnamed
        self._breaker = Breaker(
            failures=client.breaker_failures, window_seconds=client.breaker_window_seconds, open_seconds=client.breaker_open_seconds
        )
        self._retries = Budget(client.retry_share)
        self._hedges = Budget(client.hedge_share)
        self._hedging = client.hedge_share > 0
        self._latencies: deque[float] = deque(maxlen=_LATENCIES)
        self._cache_entries = client.cache_entries
        self.forget()
        self._users = 1
        self._pool = Pool(waited=telemetry.connected)

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
        trace.record({contract.CACHE_HIT: not missing})
        until = Deadline.after(deadline.within(self._timeout_seconds) if deadline else self._timeout_seconds)
        for start in range(0, len(missing), MOST_TEXTS):
            group = missing[start : start + MOST_TEXTS]
            vectors = await self._guarded(group, until)
            rows.update(zip(group, vectors, strict=True))
            self._cache.keep(self.fingerprint, group, vectors)
        return np.stack([rows[query] for query in queries]) if queries else np.empty((0, self._dims), dtype=np.float32)

    @property
    def in_use(self) -> bool:
        """Whether somebody has not yet closed it."""
        return self._users > 0

    def shared(self) -> Self:
        """The same for one more user, who closes it too: cache, connections and breaker are known to all of them."""
        self._users += 1
        return self

    def recent(self, most: int) -> list[tuple[str, Vectors]]:
        """The queries encoded last, at most so many, with the vector of each."""
        return self._cache.recent(self.fingerprint, most)

    def forget(self) -> None:
        """Empty the cache."""
        self._cache = _Cache(self._cache_entries)

    async def aclose(self) -> None:
        """Close the connections when this was the last user."""
        self._users -= 1
        if self._users > 0:
            return
        await self._pool.aclose()

    async def _guarded(self, queries: Sequence[str], until: Deadline) -> Vectors:
        """Ask through the breaker, which hears how it went."""
        with trace.span(contract.EMBEDDINGS, model=self.model):
            trace.record(
                {
                    contract.OPERATION: "embeddings",
                    contract.PROVIDER: "ragline",
                    contract.REQUEST_MODEL: self.model,
                    contract.BATCH: len(queries),
                    contract.DIMENSIONS: self._dims,
                    contract.ATTEMPT: 1,
                    contract.HEDGED: False,
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
                trace.record({contract.HEDGED: True})
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
        trace.record({contract.ATTEMPT: 2})
        return await self._ask(queries, until)

    async def _ask(self, queries: Sequence[str], until: Deadline) -> Vectors:
        body = request_body(self.model, queries, plain=self._unnamed)
        headers = {DEADLINE_HEADER: str(int(until.remaining * 1000)), **trace.outgoing_headers()}
        most = len(queries) * self._dims * _BYTES_A_NUMBER + (64 << 10)
        try:
            reply = await self._pool.post(f"{self.base_url}/v1/embeddings", body, headers, most=most)
        except Unreachable as error:
            raise _TryAgain(f"{self._origin} cannot be reached: {error}.", pause=_PAUSE) from error
        except TooLong:
            raise EncoderError(f"{self._origin} gave more than {most} bytes.", fix="Check what runs at that address.") from None
        return self._read(reply, count=len(queries))

    def _read(self, answered: Reply, *, count: int) -> Vectors:
        status, data = answered.status, answered.data
        if status in {429, 503}:
            raise _TryAgain(f"{self._origin} answered {status} ({code_of(data)}).", pause=_retry_after(answered))
        if status >= 500:
            raise EncoderUnavailable(f"{self._origin} answered {status} ({code_of(data)}).", fix=START_IT)
        if status != 200:
            raise _Refusal(f"{self._origin} refused {self.model!r} with {status} ({code_of(data)}).", fix="Check its configured models.")
        try:
            reply = ReceivedReply.model_validate_json(data)
        except ValidationError as error:
            what = f"{self._origin} gave no usable reply: {error.errors()[0]['msg']}."
            raise EncoderError(what, fix="Check what runs at that address.") from None
        if reply.fingerprint != self.fingerprint and not (self._unnamed and reply.fingerprint is None):
            served = named[:12] if (named := reply.fingerprint) and _HEX.fullmatch(named) else "none"
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


def _retry_after(answered: Reply) -> float:
    stated = answered.headers.get("retry-after", "")
    return float(stated) if stated.isdecimal() and len(stated) < 6 else _PAUSE
