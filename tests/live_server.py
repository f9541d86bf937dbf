"""A real HTTP server on a free loopback port, for the time of a `with`."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2
import uvicorn


@contextmanager
def running(app: Any, *, ready_path: str | None = None, keep_alive: int = 75, port: int = 0) -> Iterator[str]:
    """Serve an ASGI app from a thread; gives its base URL, and waits until `ready_path` answers 200."""
    config = uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error", ws="none", timeout_keep_alive=keep_alive)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        deadline = time.monotonic() + 60
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            assert time.monotonic() < deadline, "the server took too long to start"
            time.sleep(0.005)
        url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        while ready_path and httpx2.get(url + ready_path, trust_env=False).status_code != 200:
            assert time.monotonic() < deadline, "the service never became ready"
            time.sleep(0.02)
        yield url
    finally:
        server.should_exit = True
        thread.join(timeout=20)
        assert not thread.is_alive()
