"""Clients that ask and then do not read: what they hold is given back at their deadline."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx2
import pytest
import uvicorn
from small_service import build, embedding, release, settings_for

from rag_serving import app
from rag_serving.edge.ports import listening
from rag_serving.settings import Admission, Serving
from rag_serving.store import LocalStore

PAGES = {f"s3.Page{number}": (f"Page {number}", f"A bucket holds object {number}. " * 400) for number in range(50)}
SECONDS = 1.5


@pytest.fixture
def service(tmp_path):
    """URL and app of a service with one slot, a short deadline, and passages of 500 kB for a question, more than its buffers hold."""
    store, settings = LocalStore(tmp_path), settings_for(tmp_path)
    release(store, build(store, settings, PAGES))
    with embedding(settings) as vectors:
        chosen = settings_for(tmp_path, embedder_url=vectors).model_copy(
            update={"serving": Serving(poll_seconds=0.1, deadline_seconds=SECONDS), "admission": Admission(concurrency=1, queue=8)}
        )
        made = app.create_app(chosen, store=store)
        with small_buffers(made) as url:
            yield url, made


@contextmanager
def small_buffers(made) -> Iterator[str]:
    """A server that can hand the kernel a few kilobytes at a time."""
    config = uvicorn.Config(made, host="127.0.0.1", port=0, log_level="error", ws="none")
    server, listener = uvicorn.Server(config), listening(config)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    until(lambda: server.started, seconds=60)
    until(lambda: httpx2.get(f"{url}/readyz", trust_env=False).status_code == 200, seconds=60)
    try:
        yield url
    finally:
        until(lambda: not server.server_state.connections, seconds=30)
        server.should_exit = True
        thread.join(timeout=20)
        assert not thread.is_alive()


def stalled(url: str, path: str, body: dict) -> socket.socket:
    """A connection over which a question went out and from which nothing is read."""
    target = httpx2.URL(url)
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    client.connect((target.host, target.port))
    raw = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
    client.sendall(head.encode() + raw)
    return client


def until(holds, *, seconds: float) -> float:
    started = time.monotonic()
    while not holds():
        assert time.monotonic() - started < seconds
        time.sleep(0.01)
    return time.monotonic() - started


@pytest.mark.parametrize("stream", [True, False])
def test_who_does_not_read_gives_the_slot_back(service, stream):
    """A client whose buffers are full holds its slot until soon after its deadline at most; the next one is then answered."""
    url, made = service
    slots = made.state.edge.slots
    with stalled(url, "/v1/query", {"query": "Which objects does a bucket hold?", "top_k": 50, "stream": stream}) as client:
        client.settimeout(20)
        assert client.recv(1, socket.MSG_PEEK)  # the reply has begun, and stays where it is
        held = until(lambda: slots.running == 0, seconds=SECONDS + 10)
        assert held > SECONDS / 3 or not stream  # what is whole at once is left to the server
        reply = httpx2.post(f"{url}/v1/query", json={"query": "Which objects?", "top_k": 1}, trust_env=False, timeout=20)
        assert reply.status_code == 200


def test_stalled_clients_leave_no_tasks(service):
    """After clients that stalled are gone, the next ones leave no more threads behind, and the service works at once, with its slots."""
    url, made = service

    def stall_and_go() -> None:
        clients = [stalled(url, "/v1/query", {"query": "Which objects?", "top_k": 50, "stream": True}) for _ in range(4)]
        until(lambda: made.state.edge.slots.running == 1, seconds=10)
        for client in clients:
            client.close()
        until(lambda: made.state.edge.slots.running == 0 and made.state.edge.slots.waiting == 0, seconds=20)

    stall_and_go()
    threads = threading.active_count()
    for _ in range(2):
        stall_and_go()
    assert httpx2.post(f"{url}/v1/query", json={"query": "Which objects?", "top_k": 1}, trust_env=False, timeout=20).status_code == 200
    until(lambda: threading.active_count() <= threads + 3, seconds=10)
