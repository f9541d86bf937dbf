"""Replies that begin before they are whole, as Server-Sent Events, and work that ends when its client leaves.

The events of /v1/query, each with JSON as data: `hits`, what the answer will rest on (the reply of /v1/retrieve); `token`, the next piece of the
answer; `restart`, the pieces so far do not count; `citations`; and last `done`, the whole reply as without streaming, or `error`, a problem.
The pieces since the last `hits` or `restart` are the answer of `done`. Until the first event nothing is sent, so an error before it is a
refusal like any other. Who does not read what is sent is left alone (sending.py), so that no slot is held for a client that stalls.
"""

import asyncio
import json
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any, TypeVar

from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from rag_serving.edge.problems import problem_of
from rag_serving.edge.replies import query_reply, retrieve_reply
from rag_serving.exchange import Exchange
from rag_serving.pipeline import Found
from rag_serving.writing.extraction import Answer

PING_SECONDS = 15.0
EVENT_STREAM = "text/event-stream"

T = TypeVar("T")


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T], *, idle: Callable[[], Awaitable[None]] | None = None) -> T:
    """The result of the work; when the client leaves first, the work is cancelled and ClientDisconnect raised.

    The body must have been read. `idle` is called every PING_SECONDS while the work lasts.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_left(receive))
    try:
        while not working.done():
            await asyncio.wait({working, leaving}, timeout=PING_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if leaving.done() and not working.done():
                raise ClientDisconnect
            if idle is not None and not working.done():
                await idle()
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class AnswerStream(Response, ABC):
    """A reply that listens to its exchange and sends what it hears as events."""

    media_type = EVENT_STREAM

    def __init__(self, exchange: Exchange, work: Callable[[], Coroutine[Any, Any, tuple[Found, Answer]]]) -> None:
        super().__init__(headers={"X-Accel-Buffering": "no"})  # nginx would hold events back
        del self.headers["content-length"]
        exchange.listener = self
        self.exchange = exchange
        self._work = work
        self._send: Send | None = None
        self._begun = False
        self._stalled = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        del scope
        self._send = send
        try:
            await while_connected(receive, self._run(), idle=self._ping)
        except asyncio.CancelledError:
            if not self._stalled:
                raise
            raise ClientDisconnect from None

    async def found(self, found: Found) -> None:
        await self._events(self.on_found(found))

    async def wrote(self, text: str) -> None:
        await self._events(self.on_wrote(text))

    async def dropped(self) -> None:
        await self._events(self.on_dropped())

    @abstractmethod
    def on_found(self, found: Found) -> Iterator[bytes]: ...
    @abstractmethod
    def on_wrote(self, text: str) -> Iterator[bytes]: ...
    @abstractmethod
    def on_dropped(self) -> Iterator[bytes]: ...
    @abstractmethod
    def on_done(self, found: Found, answer: Answer) -> Iterator[bytes]: ...
    @abstractmethod
    def on_problem(self, body: dict[str, Any]) -> Iterator[bytes]: ...

    async def _run(self) -> None:
        try:
            found, answer = await self._work()
        except Exception as error:
            if not self._begun:
                raise
            body: dict[str, Any] = json.loads(bytes(problem_of(error, self.exchange.trace_id).body))
            await self._events(self.on_problem(body))
        else:
            await self._events(self.on_done(found, answer))
        await self._put(b"", more=False)

    async def _events(self, events: Iterator[bytes]) -> None:
        for event in events:
            await self._put(event, more=True)

    async def _ping(self) -> None:
        if self._begun:
            await self._put(KEEPALIVE_COMMENT, more=True)

    async def _put(self, data: bytes, *, more: bool) -> None:
        """Send a piece. When the client has not taken what came before in time, all ends as if it had left."""
        if self._send is None:
            return
        try:
            if not self._begun:
                self._begun = True
                await self._send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await self._send({"type": "http.response.body", "body": data, "more_body": more})
        except ClientDisconnect:
            self._stalled = True
            raise asyncio.CancelledError from None


class QueryStream(AnswerStream):
    """The events of /v1/query."""

    def on_found(self, found: Found) -> Iterator[bytes]:
        yield _event("hits", retrieve_reply(found, self.exchange).model_dump_json())

    def on_wrote(self, text: str) -> Iterator[bytes]:
        yield _event("token", json.dumps({"text": text}))

    def on_dropped(self) -> Iterator[bytes]:
        yield _event("restart", "{}")

    def on_done(self, found: Found, answer: Answer) -> Iterator[bytes]:
        reply = query_reply(found, answer, self.exchange)
        yield _event("citations", json.dumps([citation.model_dump() for citation in reply.citations]))
        yield _event("done", reply.model_dump_json())

    def on_problem(self, body: dict[str, Any]) -> Iterator[bytes]:
        yield _event("error", json.dumps(body))


def _event(name: str, data: str) -> bytes:
    return format_sse_event(event=name, data_str=data)
