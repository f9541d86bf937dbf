"""Connections to the services that a request waits for: kept between requests, without proxies, and quick to have.

They are httpx2's own pool. Its client, with cookies, redirects and decoding that nobody needs here, would double the cost of a request.
"""

import asyncio
import base64
import ssl
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache

import httpcore2
import httpx2

MOST_CONNECTIONS = 32
_KEPT_SECONDS = 30.0
_BROKEN = (httpcore2.NetworkError, httpcore2.ProtocolError, httpcore2.TimeoutException, httpcore2.UnsupportedProtocol)


class Unreachable(Exception):
    """There was no whole reply: the name of what happened, and its text."""


class TooLong(Exception):
    """The reply is longer than it may be."""


@dataclass(frozen=True, slots=True)
class Reply:
    """Names of `headers` are in lower case."""

    status: int
    headers: Mapping[str, str]
    data: bytes


@cache
def tls() -> ssl.SSLContext:
    """What https addresses are verified with. Reading the authorities takes 20 ms and more, so it is done once a process, not once a pool."""
    return httpx2.create_ssl_context(trust_env=False)


@cache
def _address(url: str) -> tuple[httpcore2.URL, str]:
    """The address as the pool wants it, and the header for the name and password in it, "" without."""
    parts = httpx2.URL(url)
    named = f"{parts.username}:{parts.password}" if parts.username or parts.password else ""
    target = httpcore2.URL(scheme=parts.raw_scheme, host=parts.raw_host, port=parts.port, target=parts.raw_path)
    return target, f"Basic {base64.b64encode(named.encode()).decode()}" if named else ""


class Pool:
    """At most `MOST_CONNECTIONS` connections, which belong to the event loop that runs: `aclose()` before it ends; it can be used again after.

    `waited` is told of every request how many seconds it waited for a connection, also of one that was given up before it got any.
    """

    def __init__(self, *, waited: Callable[[float], None] | None = None) -> None:
        self._waited = waited
        self._room = asyncio.Semaphore(MOST_CONNECTIONS)  # of the loop below, as the pool is
        self._pool: httpcore2.AsyncConnectionPool | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def post(self, url: str, body: bytes, headers: Mapping[str, str], *, most: int) -> Reply:
        """The reply to a JSON body, of at most `most` bytes. It has no timeout of its own, not even for a free connection: stand it under one.

        Raises Unreachable, and TooLong as soon as the reply is.
        """
        sent = [("Content-Type", "application/json"), ("Accept", "application/json"), ("Accept-Encoding", "identity"), *headers.items()]
        target, access = _address(url)
        if access and "Authorization" not in headers:
            sent.append(("Authorization", access))
        data = bytearray()
        try:
            async with (
                self._connection() as pool,
                pool.stream("POST", target, headers=[(name.encode(), value.encode()) for name, value in sent], content=body) as reply,
            ):
                async for piece in reply.aiter_stream():
                    data += piece
                    if len(data) > most:
                        raise TooLong
        except _BROKEN as error:
            raise Unreachable(f"{type(error).__name__} {error}".strip()) from error
        told = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in reply.headers}
        if (encoding := told.get("content-encoding", "identity")) != "identity":
            raise Unreachable(f"a reply encoded as {encoding[:20]!r}, which was not asked for")
        return Reply(reply.status, told, bytes(data))

    async def aclose(self) -> None:
        pool, self._pool = self._pool, None
        if pool is not None and self._loop is asyncio.get_running_loop():
            await pool.aclose()

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[httpcore2.AsyncConnectionPool]:
        """The pool, with a connection to be had: httpcore2 tells nobody how long one was waited for."""
        pool, room, began = self._open(), self._room, time.perf_counter()
        try:
            await room.acquire()
        finally:
            if self._waited:
                self._waited(time.perf_counter() - began)
        try:
            yield pool
        finally:
            room.release()

    def _open(self) -> httpcore2.AsyncConnectionPool:
        loop = asyncio.get_running_loop()
        if self._pool is None or self._loop is not loop:
            self._pool = httpcore2.AsyncConnectionPool(
                tls(), max_connections=MOST_CONNECTIONS, max_keepalive_connections=MOST_CONNECTIONS, keepalive_expiry=_KEPT_SECONDS
            )
            self._room, self._loop = asyncio.Semaphore(MOST_CONNECTIONS), loop
        return self._pool
