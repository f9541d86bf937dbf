"""A TCP proxy on loopback that spoils what passes through it, as told while it runs: how a dependency fails, over real sockets.

    with TcpFaults("http://127.0.0.1:8322") as faults:
        ask(faults.url)
        faults.set(Fault("latency", seconds=5))

Drills and tests use it; no service runs it by itself.
"""

import asyncio
import socket
import struct
import threading
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self
from urllib.parse import urlsplit

_HOST = "127.0.0.1"
_PIECE = 1 << 16
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER of zero seconds: close() sends RST
_PATIENCE = 10.0  # seconds for the proxy to do as told


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong. `every` 20 spoils each twentieth reply only.

    none        bytes pass
    latency     a reply starts `seconds` late
    reset       the connection is reset: at once when asked, or after `after_bytes` of the reply
    truncate    the connection ends in good order after `after_bytes` of the reply
    drip        a reply comes a byte at a time, `seconds` apart
    blackhole   connections are taken, and nothing is ever answered
    refuse      nobody listens, and open connections are reset
    """

    kind: Literal["none", "latency", "reset", "truncate", "drip", "blackhole", "refuse"] = "none"
    seconds: float = 1.0
    after_bytes: int = 0
    every: int = 1


HEALTHY = Fault()


class TcpFaults:
    """The proxy before the server at `target`, on a thread of its own for the time of a `with`; `set` works at once and from any thread."""

    def __init__(self, target: str) -> None:
        self._target = _address(target)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="tcp-faults", daemon=True)
        self._server: asyncio.Server | None = None
        self._connections: set[_Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._port = 0
        self.fault = HEALTHY
        self.accepted = 0  # connections so far
        self.replies = 0  # replies begun so far

    @property
    def url(self) -> str:
        return f"http://{_HOST}:{self._port}"

    @property
    def open_connections(self) -> int:
        return len(self._connections)

    def set(self, fault: Fault) -> None:
        """From now on this goes wrong, on open connections too; HEALTHY heals."""
        self._do(self._change(fault))

    def aim(self, target: str) -> None:
        """From now on it stands before another server; open connections are reset."""
        self._target = _address(target)
        self._do(self._drop())

    def __enter__(self) -> Self:
        self._thread.start()
        self._do(self._listen())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._do(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_PATIENCE)
        self._loop.close()

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(_PATIENCE)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._taken, _HOST, self._port, limit=_PIECE)
        self._port = self._server.sockets[0].getsockname()[1]

    async def _change(self, fault: Fault) -> None:
        self.fault = fault
        for connection in self._connections:
            connection.passed = 0
        if fault.kind == "refuse":
            await self._deafen()
        elif self._server is None:
            await self._listen()

    async def _deafen(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        await self._drop()

    async def _drop(self) -> None:
        for connection in list(self._connections):
            connection.reset()

    async def _end(self) -> None:
        await self._deafen()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _taken(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        try:
            upstream = await asyncio.open_connection(*self._target)
        except OSError:
            _reset(writer)
            return
        connection = _Connection(self, writer, upstream[1])
        self._connections.add(connection)
        tasks = [self._spawn(connection.forward(reader)), self._spawn(connection.answer(upstream[0]))]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        connection.close()
        self._connections.discard(connection)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


class _Connection:
    """One client and its connection to the target; `passed` counts the bytes of the reply under way."""

    def __init__(self, proxy: TcpFaults, client: asyncio.StreamWriter, target: asyncio.StreamWriter) -> None:
        self._proxy = proxy
        self._client = client
        self._target = target
        self._asked = False
        self._spoiled = False
        self.passed = 0

    def reset(self) -> None:
        _reset(self._client)
        self._target.transport.abort()

    def close(self) -> None:
        self._client.close()
        self._target.close()

    async def forward(self, reader: asyncio.StreamReader) -> None:
        with suppress(OSError):
            while data := await reader.read(_PIECE):
                fault = self._proxy.fault
                self._asked = True
                if fault.kind == "blackhole":
                    continue
                if fault.kind == "reset" and not fault.after_bytes and fault.every == 1:
                    self.reset()
                    return
                self._target.write(data)
                await self._target.drain()

    async def answer(self, reader: asyncio.StreamReader) -> None:
        with suppress(OSError):
            while data := await reader.read(_PIECE):
                fault = self._proxy.fault
                begins, self._asked = self._asked, False
                if begins:
                    self.passed = 0
                    self._proxy.replies += 1
                    self._spoiled = self._proxy.replies % fault.every == 0
                if not self._spoiled:
                    await self._pass(data)
                elif fault.kind == "latency":
                    await asyncio.sleep(fault.seconds if begins else 0)
                    await self._pass(data)
                elif fault.kind == "drip":
                    for byte in data:
                        await self._pass(bytes((byte,)))
                        await asyncio.sleep(fault.seconds)
                elif fault.kind in {"reset", "truncate"}:
                    await self._pass(data[: max(0, fault.after_bytes - self.passed)])
                    if self.passed >= fault.after_bytes:
                        self.reset() if fault.kind == "reset" else self.close()
                        return
                elif fault.kind == "none":
                    await self._pass(data)

    async def _pass(self, data: bytes) -> None:
        self._client.write(data)
        self.passed += len(data)
        await self._client.drain()


def _address(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    return parts.hostname or _HOST, parts.port or 80


def _reset(writer: asyncio.StreamWriter) -> None:
    connected = writer.get_extra_info("socket")
    if connected is not None:
        with suppress(OSError):
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()
