"""Ports: what is free, and that both services say in one line which variable to change when theirs is not."""

import socket
from functools import partial

import pytest
from small_service import settings_for

from rag_serving import app, embedder
from rag_serving.edge.ports import port_is_free, require_port
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
