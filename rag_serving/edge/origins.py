"""Which names the service answers to, and which pages may have a browser call it.

A page of another site can make a browser send requests to this machine: by a name of its own that resolves here, or straight across origins.
The first shows in Host, the second in Origin.
"""

import ipaddress
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from rag_serving.errors import AccessError

_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})


class Origins:
    """Plain addresses and localhost are always good, since no foreign name stands behind them; other names must be `allowed`; `*` is any."""

    def __init__(self, allowed: Iterable[str] = (), *, own: str = "localhost") -> None:
        self._allowed = {name.lower() for name in allowed}
        self._names = self._allowed | {"localhost", own.lower()}

    def check(self, method: str, headers: Headers) -> None:
        """AccessError `unknown_host` for a name that is not ours, `cross_origin` for a change asked for by another site's page."""
        host = headers.get("host", "")
        if len(headers.getlist("host")) != 1 or not self._ours(_name_of(f"//{host}")):
            raise AccessError(
                "the service is not known under the name in the Host header.",
                fix="Use its address, or add the name to access.allowed_hosts.",
                code="unknown_host",
            )
        origin = headers.get("origin")
        if method in _SAFE or origin is None or _netloc(origin) == host.lower():
            return
        name = _name_of(origin)
        if not name or name not in self._allowed:
            raise AccessError(
                "a page of another origin may not ask this.",
                fix="Ask from the service's own page, or without a browser.",
                code="cross_origin",
            )

    def _ours(self, name: str) -> bool:
        if not name:
            return False
        if name in self._names or "*" in self._names:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


def _netloc(origin: str) -> str:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _name_of(url: str) -> str:
    """The host of a URL in lower case, without port and brackets; empty when there is none."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""
