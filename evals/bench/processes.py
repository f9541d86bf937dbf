"""Services in processes of their own, for the time of a bench."""

import asyncio
import logging
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import httpx2

from rag_serving.errors import PlatformError

HOST = "127.0.0.1"
_START_SECONDS = 120
_NICENESS = 5  # of services: who measures goes first, or what is measured would be the wait for the clock


def free_port() -> int:
    with socket.socket() as free:
        free.bind((HOST, 0))
        port: int = free.getsockname()[1]
    return port


@asynccontextmanager
async def running(serve: Callable[..., None], *arguments: Any, **named: Any) -> AsyncIterator[str]:
    """The address of a ready service, `serve(*arguments, host=, port=, **named)` in a fresh process that ends with the `async with`.

    PlatformError when its /readyz does not answer 200 in time.
    """
    port = free_port()
    process = multiprocessing.get_context("spawn").Process(
        target=_quiet, args=(partial(serve, *arguments, host=HOST, port=port, **named),), daemon=True
    )
    process.start()
    url = f"http://{HOST}:{port}"
    try:
        async with httpx2.AsyncClient(base_url=url, trust_env=False, timeout=10) as client:
            await _until_ready(client, process)
        yield url
    finally:
        process.terminate()
        await asyncio.to_thread(process.join)


def _quiet(serve: Callable[[], None]) -> None:
    logging.disable(logging.WARNING)
    os.nice(_NICENESS)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # uvicorn raises the signal again when it has ended
    serve()


async def _until_ready(client: httpx2.AsyncClient, process: multiprocessing.process.BaseProcess) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while process.is_alive() and time.monotonic() < deadline:
        try:
            if (await client.get("/readyz")).status_code == 200:
                return
        except httpx2.TransportError:
            pass
        await asyncio.sleep(0.1)
    raise PlatformError("a service of the bench did not get ready.", fix="Run `ragline serve` and `ragline embedder` to see why.")
