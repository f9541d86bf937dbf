"""How our services run and where they listen: whether they could, asked before one is started since its own refusal comes late."""

import os
import socket
from contextlib import closing
from typing import Any

import uvicorn
from fastapi.telemetry import TelemetryConfig

from rag_serving.errors import PlatformError

STALLED_SECONDS = 20.0
NO_TELEMETRY: TelemetryConfig = {"tracing": False, "metrics": False, "logs": False}
"""For FastAPI, whose own records whole addresses and the words of exceptions, wherever a provider is set for all. Ours: signals/trace.py."""


def port_is_free(host: str, port: int) -> bool:
    """Whether a server could listen there now."""
    return not _refusal(host, port)


def require_port(host: str, port: int, *, variable: str) -> None:
    """PlatformError, with the variable that holds the port, unless a server could listen there now. Port 0, any free one, is allowed."""
    if refusal := _refusal(host, port):
        raise PlatformError(
            f"cannot listen on {host}:{port}: {refusal}.", fix=f"Stop what listens there, or set {variable} to another port."
        )


def server_config(app: Any, *, host: str, port: int) -> uvicorn.Config:
    """How our services run: spans and metrics instead of an access log, no websockets, forwarded addresses not believed, ten seconds to end in."""
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        access_log=False,
        log_config=None,
        ws="none",
        timeout_keep_alive=75,
        timeout_graceful_shutdown=10,
        proxy_headers=False,
    )


def listening(config: uvicorn.Config, *, stalled_seconds: float = STALLED_SECONDS) -> socket.socket:
    """The socket of a server. A connection whose other end takes nothing for so long, though there is something to send, is cut.

    Closing one waits for what is still to be sent, so without that a client that never reads would keep it open for good. The kernel does it
    (TCP_USER_TIMEOUT, tcp(7): inherited by accepted connections) on Linux; elsewhere connections last as long as their clients.
    """
    listener = config.bind_socket()
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(stalled_seconds * 1000))
    return listener


def _refusal(host: str, port: int) -> str:
    with closing(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except socket.gaierror as error:
            return str(error.strerror)
        except OSError as error:
            return os.strerror(error.errno) if error.errno else str(error)
        except OverflowError:
            return "a port is at most 65535"
    return ""
