"""A list of web addresses as a source: what is fetched, and what must never be."""

import socket
import ssl
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from mixed_files import pdf

from rag_assets.parsing import Quarantined, parse_items
from rag_assets.sources import open_source
from rag_assets.sources.items import Refused
from rag_assets.sources.urls import is_public, public_addresses
from rag_serving.errors import SourceError
from rag_serving.settings import Parsing

HTML = {"Content-Type": "text/html; charset=iso-8859-1"}


class Pages(BaseHTTPRequestHandler):
    """Answers from `pages`: path -> (status, headers, body or a function that writes it)."""

    pages: dict[str, tuple[int, dict[str, str], object]]
    asked: list[str]

    def do_GET(self):
        self.asked.append(self.path)
        status, headers, body = self.pages.get(self.path, (404, {}, b""))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        body(self.wfile) if callable(body) else self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def site(tmp_path):
    """A server on loopback; call it with paths or addresses to get what the source makes of them."""
    handler = type("SitePages", (Pages,), {"pages": {}, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    host = f"127.0.0.1:{server.server_port}"

    def fetch(*addresses: str, private=(host,), **limits):
        listed = [address if "://" in address else f"http://{host}{address}" for address in addresses]
        (tmp_path / "urls.txt").write_text("# the pages\n\n" + "\n".join(listed), encoding="utf-8")
        bounds = Parsing(**limits)
        source = open_source("urls:urls.txt", root=tmp_path, limits=bounds, private_hosts=tuple(private))
        return [found for _, found in parse_items(source.items(), limits=bounds)]

    fetch.pages, fetch.asked, fetch.host, fetch.handler = handler.pages, handler.asked, host, handler
    yield fetch
    server.shutdown()
    server.server_close()
    thread.join()


def reasons(found) -> list[str]:
    return [each.reason if isinstance(each, Quarantined) else "read" for each in found]


def test_pages_are_read_by_their_type(site):
    """HTML, PDF and text are read by content type or suffix, in the order of the list; ids are the addresses; a repeated one counts once."""
    site.pages |= {
        "/a": (200, HTML, "<h1>Café</h1>".encode("latin-1")),
        "/b.md": (200, {"Content-Type": "text/plain"}, b"# B"),
        "/c": (200, {"Content-Type": "application/pdf"}, pdf(["words in a pdf"])),
        "/d.txt": (200, {}, b"plain"),
    }
    a, b, c, d = site("/a", "/b.md", "/c", "/d.txt", "/a")
    assert (a.title, a.text, a.doc_id) == ("Café", "# Café", f"http://{site.host}/a")
    assert (b.title, d.text) == ("B", "plain")
    assert "words in a pdf" in c.text


def test_what_cannot_be_fetched_is_refused_by_reason_and_the_rest_is_read(site):
    """Missing pages, other types, other schemes, dead hosts and bad addresses are quarantined; the last page is read."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        dead = f"127.0.0.1:{unused.getsockname()[1]}"
        site.pages |= {"/ok": (200, HTML, b"fine"), "/png": (200, {"Content-Type": "image/png"}, b"x"), "/500": (500, {}, b"")}
        listed = [
            "/404",
            "/500",
            "/png",
            f"http://{dead}/",
            "file:///etc/passwd",
            "gopher://x/",
            "http://[::1/",
            "http://u:p@example.org/",
            "/ok",
        ]
        found = site(*listed, private=(site.host, dead))
    expected = ["http_404", "http_500", "unsupported", "unreachable", "scheme_not_allowed", "scheme_not_allowed", "invalid_address"]
    assert reasons(found) == [*expected, "invalid_address", "read"]


@pytest.mark.parametrize(
    "address",
    [
        "http://127.0.0.1:{port}/secret",
        "http://localhost:{port}/secret",
        "http://2130706433:{port}/secret",
        "http://0x7f000001:{port}/secret",
        "http://0177.0.0.1:{port}/secret",
        "http://127.1:{port}/secret",
        "http://0.0.0.0:{port}/secret",
        "http://[::1]:{port}/secret",
        "http://[::ffff:127.0.0.1]:{port}/secret",
        "http://[::ffff:7f00:1]:{port}/secret",
        "http://169.254.169.254/latest/meta-data/",
        "http://10.0.0.1/",
        "http://192.168.0.1/",
        "http://[fd00::1]/",
        "http://[64:ff9b::7f00:1]/",
    ],
)
def test_addresses_inside_are_refused(site, address):
    """Loopback, link-local, private and embedded addresses, however they are written, are refused before a connection is made."""
    site.pages["/secret"] = (200, HTML, b"secret")
    port = site.host.rpartition(":")[2]
    assert reasons(site(address.format(port=port), private=())) in (["address_not_public"], ["unreachable"], ["invalid_address"])
    assert site.asked == []


def test_redirects_are_checked_each_and_counted(site):
    """Three redirects are followed, a fourth is not; one to another scheme or to an address inside is refused without a connection."""
    port = site.host.rpartition(":")[2]
    for number in range(1, 6):
        site.pages[f"/{number}"] = (302, {"Location": f"/{number - 1}"}, b"")
    site.pages |= {
        "/0": (200, HTML, b"there"),
        "/to_file": (302, {"Location": "file:///etc/passwd"}, b""),
        "/to_inside": (302, {"Location": f"http://localhost:{port}/0"}, b""),
        "/to_metadata": (301, {"Location": "http://169.254.169.254/latest/"}, b""),
        "/to_itself": (302, {"Location": "/to_itself"}, b""),
    }
    found = site("/3", "/4", "/to_file", "/to_inside", "/to_metadata", "/to_itself")
    assert reasons(found) == [
        "read", "too_many_redirects", "scheme_not_allowed", "address_not_public", "address_not_public", "too_many_redirects",
    ]  # fmt: skip
    assert found[0].metadata["url"] == f"http://{site.host}/0"


def test_a_name_that_changes_its_address_is_not_followed(site, monkeypatch):
    """DNS rebinding: the name is resolved once, and the connection goes to the address that was checked, not to a second answer."""
    answers = iter(["93.184.216.34", "127.0.0.1", "127.0.0.1"])
    connected = []

    def resolve(host, port, *args, **kwargs):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(answers), port))]

    def connect(address, *args, **kwargs):
        connected.append(address[0])
        raise OSError("no network in tests")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(socket, "create_connection", connect)
    assert reasons(site("http://rebinding.example/")) == ["unreachable"]
    assert connected == ["93.184.216.34"]


def test_a_name_with_any_inside_address_is_refused(monkeypatch):
    """A name that resolves to a public and a private address is refused whole."""
    both = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 80)) for address in ("93.184.216.34", "10.0.0.7")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: both)
    with pytest.raises(Refused, match=r"10\.0\.0\.7"):
        public_addresses("half.example", 80)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:4700::1111", True),
        ("::ffff:93.184.216.34", True),
        ("127.0.0.1", False),
        ("100.64.0.1", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("ff02::1", False),
        ("::ffff:10.0.0.1", False),
        ("fec0::1", False),
        ("2002:7f00:1::", False),
        ("64:ff9b::a00:1", False),
    ],
)
def test_which_addresses_are_public(address, public):
    """Public is what anyone can reach; IPv4 inside IPv6 counts by the IPv4 address."""
    assert is_public(address) is public


def test_size_and_time_are_limited(site):
    """A body over the size, announced or not, one that drips past the time, and a compressed one are refused in time; no more is read."""

    def drip(out):
        for _ in range(100):
            try:
                out.write(b"x")
                out.flush()
            except OSError:
                return
            time.sleep(0.1)

    site.pages |= {
        "/long": (200, HTML | {"Content-Length": "5000"}, b"x" * 5000),
        "/endless": (200, HTML, lambda out: out.write(b"x" * 5000)),
        "/slow": (200, HTML, drip),
        "/packed": (200, HTML | {"Content-Encoding": "gzip"}, b"x"),
        "/ok": (200, HTML, b"x" * 900),
    }
    started = time.monotonic()
    found = site("/long", "/endless", "/slow", "/packed", "/ok", max_bytes=1000, timeout_seconds=2)
    assert reasons(found) == ["too_large", "too_large", "timeout", "unsupported", "read"]
    assert time.monotonic() - started < 10


def test_slow_headers_end_with_the_time(site):
    """A server that sends a byte of its headers now and then is left when the time is over, not when it is done."""

    class Dripping(dict):
        def items(self):
            for number in range(60):
                time.sleep(0.1)
                yield f"X-{number}", "x"

    send = site.handler.send_header
    site.handler.send_header = lambda self, *pair: (send(self, *pair), self.flush_headers())
    site.pages["/slow"] = (200, Dripping(), b"x")
    started = time.monotonic()
    assert reasons(site("/slow", timeout_seconds=1)) == ["timeout"]
    assert time.monotonic() - started < 4


@pytest.mark.parametrize("location", ["http://[::1", "http://[zz]/"])
def test_a_redirect_to_nonsense_is_refused(site, location):
    """A redirect to what is no address refuses that page; the others are read."""
    site.pages |= {"/bad": (302, {"Location": location, "Content-Length": "0"}, b""), "/ok": (200, HTML, b"words")}
    assert reasons(site("/bad", "/ok")) == ["invalid_address", "read"]


def test_a_tagged_page_is_read_only_when_it_is_asked_for(site, tmp_path):
    """With a strong ETag listing gives the version without keeping the body; a page that changes between listing and reading is refused."""
    site.pages["/a"] = (200, HTML | {"ETag": '"1"'}, b"one")
    (tmp_path / "list.txt").write_text(f"http://{site.host}/a\n")
    source = open_source("urls:list.txt", root=tmp_path, private_hosts=(site.host,))
    (item,) = source.items()
    assert item.version == 'etag:"1"'
    assert item.read() == b"one"
    site.pages["/a"] = (200, HTML | {"ETag": '"2"'}, b"two")
    with pytest.raises(Refused, match="changed") as raised:
        item.read()
    assert raised.value.passing
    assert next(iter(source.items())).version == 'etag:"2"'


def test_an_empty_or_missing_list_is_an_error(tmp_path):
    """A list that is not there, or names nothing, is a SourceError."""
    with pytest.raises(SourceError, match="cannot read"):
        list(open_source("urls:none.txt", root=tmp_path).items())
    (tmp_path / "empty.txt").write_text("# nothing\n")
    with pytest.raises(SourceError, match="names no address"):
        list(open_source("urls:empty.txt", root=tmp_path).items())


def test_certificates_are_verified(site, tmp_path):
    """An https address whose server cannot show a certificate that is trusted is not read."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    assert context.verify_mode == ssl.CERT_NONE  # the server asks for none; the client's own default decides
    assert reasons(site(f"https://{site.host}/")) == ["unreachable"]


def test_the_list_is_read_relative_to_the_settings(tmp_path):
    """urls:FILE is relative to the folder of ragline.toml, as every path of a source is."""
    assert open_source("urls:a/list.txt", root=tmp_path).path == Path(tmp_path, "a/list.txt")
