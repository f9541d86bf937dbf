"""Ports: what is free, and that both services say in one line which variable to change when theirs is not."""

import asyncio
import socket
import threading
import time
from functools import partial

import pytest
import uvicorn
from small_service import settings_for

from rag_serving import app, embedder
from rag_serving.edge.ports import listening, port_is_free, require_port
from rag_serving.errors import PlatformError


@pytest.mark.parametrize(
    ("serve", "variable"), [(app.serve, "RAGLINE_SERVING_PORT"), (partial(embedder.serve, models=()), "RAGLINE_EMBEDDER_PORT")]
)
def test_taken_port_is_one_line(tmp_path, serve, variable):
    """A service on a taken port is a PlatformError with host, port, cause and variable, before anything else is done."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert not port_is_free("127.0.0.1", port)
        with pytest.raises(PlatformError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use") as refusal:
            serve(settings_for(tmp_path), host="127.0.0.1", port=port)
    assert variable in refusal.value.fix
    assert "\n" not in str(refusal.value)
    assert port_is_free("127.0.0.1", port)
    require_port("127.0.0.1", port, variable=variable)


def test_port_zero_is_allowed():
    """Port 0 asks for any free port and is never taken."""
    require_port("127.0.0.1", 0, variable="RAGLINE_SERVING_PORT")
    assert port_is_free("127.0.0.1", 0)


@pytest.mark.parametrize(("host", "port"), [("127.0.0.1", 70000), ("192.0.2.1", 0), ("no-such-host.invalid", 0)])
def test_address_that_cannot_be_used(host, port):
    """A port out of range, another machine's address and an unknown name are refused in the same way."""
    assert not port_is_free(host, port)
    with pytest.raises(PlatformError, match=f"cannot listen on {host}:{port}: .+"):
        require_port(host, port, variable="RAGLINE_SERVING_PORT")


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="the kernel cuts stalled connections on Linux alone")
def test_stalled_connections_are_cut():
    """A connection from which nothing is read, closed by the server with much still to be sent, is gone after `stalled_seconds`."""

    async def much(scope, receive, send):
        if scope["type"] == "lifespan":
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        try:
            for _ in range(64):
                await asyncio.sleep(0.01)  # uvloop writes, and notices that it cannot, in its next round
                async with asyncio.timeout(0.2):
                    await send({"type": "http.response.body", "body": bytes(1 << 20), "more_body": True})
        except TimeoutError:
            ended.set()

    ended = threading.Event()
    config = uvicorn.Config(much, host="127.0.0.1", port=0, log_level="critical", lifespan="off", ws="none")
    server, listener = uvicorn.Server(config), listening(config, stalled_seconds=1)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.connect(listener.getsockname())
        client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert ended.wait(20)
        deadline = time.monotonic() + 20
        while server.server_state.connections:
            assert time.monotonic() < deadline, "the connection is still open"
            time.sleep(0.02)
    server.should_exit = True
    thread.join(timeout=20)
    assert not thread.is_alive()
