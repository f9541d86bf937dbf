"""A list of web addresses as a source, fetched so that no address inside this network can be reached through it."""

import hashlib
import ipaddress
import socket
import ssl
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from email.message import Message
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urljoin

import httpcore2
import httpx2

from rag_assets.sources.items import Item, Refused, refused_item
from rag_assets.sources.media import FORMATS
from rag_serving.errors import SourceError
from rag_serving.settings import Parsing

MAX_REDIRECTS = 3
_HEADERS = (("User-Agent", "ragline"), ("Accept", "*/*"), ("Accept-Encoding", "identity"))
_OFFICE = "application/vnd.openxmlformats-officedocument."
_SUFFIX_OF = {
    "text/html": ".html",
    "application/xhtml+xml": ".html",
    "text/markdown": ".md",
    "text/plain": ".txt",
    "text/x-rst": ".rst",
    "text/csv": ".csv",
    "application/json": ".json",
    "application/pdf": ".pdf",
    f"{_OFFICE}wordprocessingml.document": ".docx",
    f"{_OFFICE}presentationml.presentation": ".pptx",
    f"{_OFFICE}spreadsheetml.sheet": ".xlsx",
}


@dataclass(frozen=True, slots=True)
class UrlsSource:
    """The pages a text file names, one http(s) address a line, # before comments. `doc_id` is the address as listed.

    Each host is resolved once, every address it has must be public, and the connection goes to that address; each of at most MAX_REDIRECTS
    redirects is checked alike. `private_hosts` ("host:port") are exempt. An address that cannot be fetched within the limits is listed as
    an item that refuses. `version` is a strong ETag, then `read()` fetches again and refuses if it changed, else the sha256 of the body.
    """

    uri: str
    path: Path
    limits: Parsing
    private_hosts: Sequence[str] = ()

    def items(self) -> Iterator[Item]:
        try:
            lines = [line.strip() for line in self.path.read_text(encoding="utf-8-sig").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise SourceError(f"cannot read {self.path}: {error}.", fix="Give a text file with one address a line.") from None
        urls = dict.fromkeys(line for line in lines if line and not line.startswith("#"))
        if not urls:
            raise SourceError(f"{self.path} names no address.", fix="Put one http(s) address on each line.")
        for url in urls:
            try:
                yield self._item(url)
            except Refused as refusal:
                yield refused_item(url, refusal.reason, refusal.what)

    def _item(self, url: str) -> Item:
        with self._get(url) as (final, headers, body):
            suffix = _suffix(final, headers)
            charset = headers.get_content_charset()
            metadata = {"suffix": suffix, "url": final, **({"charset": charset} if charset else {})}
            etag = headers.get("etag", "")
            if etag.startswith('"'):
                return Item(url, f"etag:{etag}", suffix, _length(headers), lambda: self._again(url, etag), metadata)
            data = b"".join(body)
        return Item(url, hashlib.sha256(data).hexdigest(), suffix, len(data), lambda: data, metadata)

    def _again(self, url: str, etag: str) -> bytes:
        try:
            with self._get(url) as (_, headers, body):
                found, data = headers.get("etag", ""), b"".join(body)
        except Refused as refusal:
            raise Refused(refusal.reason, refusal.what, passing=refusal.reason != "too_large") from None
        if found != etag:
            changed = "its content changed between listing and reading; the next run takes the new one"
            raise Refused("changed_meanwhile", changed, passing=True)
        return data

    @contextmanager
    def _get(self, url: str) -> Iterator[tuple[str, Message, Iterator[bytes]]]:
        """Final address, headers and body of a page, within the limits of time and size. Raises Refused."""
        deadline = time.monotonic() + self.limits.timeout_seconds
        waits = dict.fromkeys(("connect", "read", "write", "pool"), min(10.0, self.limits.timeout_seconds))
        target = url
        try:
            for _ in range(MAX_REDIRECTS + 1):
                with (
                    httpcore2.ConnectionPool(network_backend=_PublicOnly(self.private_hosts, deadline)) as pool,
                    pool.stream("GET", _checked(target), headers=_HEADERS, extensions={"timeout": waits}) as reply,
                ):
                    headers = Message()
                    for name, value in reply.headers:
                        headers[name.decode("latin-1")] = value.decode("latin-1")
                    if reply.status in (301, 302, 303, 307, 308) and headers["location"]:
                        target = _joined(target, headers["location"])
                        continue
                    if reply.status != 200:
                        raise Refused(f"http_{reply.status}", f"{target} answered {reply.status}")
                    if headers.get("content-encoding", "identity") != "identity":
                        raise Refused("unsupported", f"{target} is sent as {headers['content-encoding']}, though it was asked for plain")
                    if _length(headers) > self.limits.max_bytes:
                        raise Refused(
                            "too_large", f"{target} announces {_length(headers):,} bytes; at most {self.limits.max_bytes:,} are read"
                        )
                    yield target, headers, self._bounded(reply)
                    return
        except httpcore2.TimeoutException:
            raise Refused("timeout", f"{target} did not answer in time") from None
        except (httpcore2.NetworkError, httpcore2.ProtocolError) as error:
            raise Refused("unreachable", f"{target} cannot be fetched: {error}") from None
        raise Refused("too_many_redirects", f"{url} redirects more than {MAX_REDIRECTS} times")

    def _bounded(self, reply: "httpcore2.Response") -> Iterator[bytes]:
        size = 0
        for piece in reply.iter_stream():
            size += len(piece)
            if size > self.limits.max_bytes:
                raise Refused("too_large", f"it is longer than {self.limits.max_bytes:,} bytes")
            yield piece


def public_addresses(host: str, port: int) -> list[str]:
    """The addresses of a host, resolved now. Refused when it has none, or any that is not public."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise Refused("unreachable", f"{host} cannot be resolved: {error}") from None
    addresses = list(dict.fromkeys(str(each[4][0]) for each in found))
    for address in addresses:
        if not is_public(address):
            raise Refused("address_not_public", f"{host} is at {address}, which is no public address")
    return addresses


def is_public(address: str) -> bool:
    """Whether an IP address is reachable by anyone, and so is the IPv4 address inside an IPv6 one (mapped, 6to4, Teredo, NAT64)."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    site_local = isinstance(ip, ipaddress.IPv6Address) and ip.is_site_local
    if not ip.is_global or ip.is_multicast or ip.is_reserved or ip.is_unspecified or site_local:
        mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
        return mapped is not None and is_public(str(mapped))
    if isinstance(ip, ipaddress.IPv6Address):
        within = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if within is None and ip in ipaddress.ip_network("64:ff9b::/96"):
            within = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        return within is None or is_public(str(within))
    return True


class _PublicOnly(httpcore2.NetworkBackend):
    """Connects to the very address that was checked, so that a second look-up of the name cannot lead elsewhere; waits until `deadline`."""

    def __init__(self, private_hosts: Sequence[str], deadline: float) -> None:
        self._private_hosts = private_hosts
        self._deadline = deadline
        self._network = httpcore2.SyncBackend()

    def connect_tcp(self, host: str, port: int, timeout: float | None = None, *args: Any, **kwargs: Any) -> httpcore2.NetworkStream:
        addresses = [host] if f"{host}:{port}" in self._private_hosts else public_addresses(host, port)
        failed: httpcore2.NetworkError | httpcore2.TimeoutException | None = None
        for address in addresses:
            try:
                stream = self._network.connect_tcp(address, port, _left(self._deadline, timeout), *args, **kwargs)
                return _Timed(stream, self._deadline)
            except (httpcore2.NetworkError, httpcore2.TimeoutException) as error:
                failed = error
        raise failed or httpcore2.ConnectError(f"{host} has no address")


class _Timed(httpcore2.NetworkStream):
    """A connection whose every wait ends at `deadline`, so that a server that sends a byte now and then does not hold the run."""

    def __init__(self, stream: httpcore2.NetworkStream, deadline: float) -> None:
        self._stream = stream
        self._deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, _left(self._deadline, timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, _left(self._deadline, timeout))

    def close(self) -> None:
        self._stream.close()

    def start_tls(self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None) -> "_Timed":
        return _Timed(self._stream.start_tls(ssl_context, server_hostname, _left(self._deadline, timeout)), self._deadline)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


def _left(deadline: float, timeout: float | None) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise httpcore2.ReadTimeout("the time of the whole fetch is over")
    return min(left, timeout or left)


def _joined(target: str, location: str) -> str:
    try:
        return urljoin(target, location)
    except ValueError as error:
        raise Refused("invalid_address", f"{target} redirects to {location!r}, which is no address: {error}") from None


def _checked(url: str) -> httpcore2.URL:
    try:
        parts = httpx2.URL(url)
    except (httpx2.InvalidURL, ValueError) as error:
        raise Refused("invalid_address", f"{url!r} is no address: {error}") from None
    if parts.scheme not in ("http", "https") or not parts.host:
        raise Refused("scheme_not_allowed", f"{url!r} is no http(s) address")
    if parts.userinfo:
        raise Refused("invalid_address", "an address must not hold a user name or a password")
    return httpcore2.URL(scheme=parts.raw_scheme, host=parts.raw_host, port=parts.port, target=parts.raw_path)


def _length(headers: Message) -> int:
    announced = str(headers.get("content-length", ""))
    return int(announced) if announced.isdecimal() else 0


def _suffix(url: str, headers: Message) -> str:
    named = PurePosixPath(httpx2.URL(url).path).suffix.lower()
    told = _SUFFIX_OF.get(headers.get_content_type()) if headers.get("content-type") else None
    suffix = named if named in FORMATS and told in (None, ".txt") else told
    if suffix is None:
        raise Refused("unsupported", f"{url} is {headers.get_content_type()}, of which no text is made")
    return suffix
