"""Whether a server could listen at an address, asked before one is started: a server's own refusal comes late and as a log line."""

import os
import socket
from contextlib import closing

from rag_serving.errors import PlatformError


def port_is_free(host: str, port: int) -> bool:
    """Whether a server could listen there now."""
    return not _refusal(host, port)


def require_port(host: str, port: int, *, variable: str) -> None:
    """PlatformError, with the variable that holds the port, unless a server could listen there now. Port 0, any free one, is allowed."""
    if refusal := _refusal(host, port):
        raise PlatformError(
            f"cannot listen on {host}:{port}: {refusal}.", fix=f"Stop what listens there, or set {variable} to another port."
        )


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
