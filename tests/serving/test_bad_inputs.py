"""Bad requests over a real socket: each has its status and its stable code, none is a 500, and none disturbs the next request."""

import json
import re
import socket

import pytest
from live_server import running
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from small_service import problem, release, serving, settings_for, two_snapshots

from rag_serving import app
from rag_serving.app import MOST_BODY_BYTES

ASK = {"query": "How do I delete a bucket?"}
JSON = {"Content-Type": "application/json"}
WORK = ("/v1/query", "/v1/retrieve")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A settings object and a store with a release."""
    root = tmp_path_factory.mktemp("bad")
    store, manifest, _ = two_snapshots(root)
    release(store, manifest)
    return settings_for(root), store


@pytest.fixture(scope="module")
def client(made):
    with serving(*made) as client:
        yield client


@pytest.fixture(autouse=True)
def goes_on(request):
    """After every bad request the service answers a good one."""
    yield
    if "client" in request.fixturenames:
        assert request.getfixturevalue("client").post("/v1/retrieve", json=ASK).status_code == 200


def sent(client, raw: bytes) -> bytes:
    """What comes back for these bytes, up to the end of the connection or of what a reply holds."""
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=20) as connection:
        connection.sendall(raw)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65_536), b""))


def refusal(client, path: str, body: bytes | dict) -> tuple[int, str]:
    reply = client.post(path, content=body if isinstance(body, bytes) else json.dumps(body).encode(), headers=JSON)
    found = problem(reply)
    assert found["fix"]
    return found["status"], found["code"]


def short(value: str) -> str:
    """A test id that can be printed."""
    return ascii(value)[1:20]


# size and time


def test_a_stated_length_over_the_cap(client):
    """A body stated as too long is refused from its headers alone, before a byte of it was sent."""
    head = f"POST /v1/query HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {MOST_BODY_BYTES + 1}\r\n\r\n"
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=20) as connection:
        connection.sendall(head.encode())
        reply = connection.recv(65_536)
    assert b" 413 " in reply.splitlines()[0]
    assert b"body_too_long" in reply


def test_an_unstated_length_over_the_cap(client):
    """A body without a stated length is cut off at the cap."""
    reply = client.post("/v1/query", content=(b"x" * 8192 for _ in range(20)), headers=JSON)
    assert (reply.status_code, problem(reply)["code"]) == (413, "body_too_long")


def test_a_slow_body(made, monkeypatch):
    """A body that does not arrive in time is refused with 408, and held no slot meanwhile."""
    monkeypatch.setattr(app, "BODY_SECONDS", 0.5)
    settings, store = made
    settings = settings.model_copy(update={"admission": settings.admission.model_copy(update={"concurrency": 1, "queue": 0})})
    with (
        serving(settings, store) as client,
        socket.create_connection((client.base_url.host, client.base_url.port), timeout=20) as connection,
    ):
        connection.sendall(b"POST /v1/query HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{")
        assert client.post("/v1/retrieve", json=ASK).status_code == 200
        reply = connection.recv(65_536)
    assert b" 408 " in reply.splitlines()[0]
    assert b"body_too_slow" in reply


def test_long_headers(client):
    """Headers above 16 KiB are refused; far above, the connection ends, and the service goes on."""
    assert problem(client.get("/livez", headers={"X-Long": "x" * 17_000}))["code"] == "headers_too_long"
    reply = sent(client, b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX-Long: " + b"x" * 500_000 + b"\r\n\r\n")
    assert reply.splitlines()[:1] in ([], [b"HTTP/1.1 400 Bad Request"], [b"HTTP/1.1 431 Request Header Fields Too Large"])


@pytest.mark.parametrize(
    "raw",
    [b"\x00\xff\x16\x03\x01", b"GET\r\n\r\n", b"POST /v1/query HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n{}"],
    ids=range(3),
)
def test_no_http_at_all(client, raw):
    """Bytes that are no HTTP end their connection."""
    assert b" 200 " not in sent(client, raw)


def test_a_client_that_leaves_mid_body(client, caplog):
    """A connection that ends before its body is whole is no error of the service."""
    assert (
        sent(client, b"POST /v1/query HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{") == b""
    )
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


# the body

NOT_JSON = [b"", b"{", b"\xff\xfe", b'{"query": "a", "top_k": NaN}', b'{"query": "a", "query": "b"}', b"[" * 60_000, b"'a'"]
NOT_JSON += [b'{"query": "a", "top_k": ' + b"9" * 5000 + b"}", b'{"query": "a"} {}', b'\xef\xbb\xbf{"query": "a"}', b'{"a":' * 9_000]


@pytest.mark.parametrize("path", WORK)
@pytest.mark.parametrize("body", NOT_JSON, ids=range(len(NOT_JSON)))
def test_not_json(client, body, path):
    """Empty, cut off, not UTF-8, with NaN, a repeated key, an endless number, a BOM, or nested without end: not JSON."""
    assert refusal(client, path, body) == (400, "invalid_json")


@pytest.mark.parametrize("path", WORK)
@pytest.mark.parametrize("body", [b"[]", b"null", b"{}", b"5", b'"query"', b'{"query": 5}', b'{"query": null}', b'{"query": ["a"]}'])
def test_not_a_question(client, body, path):
    """JSON that is no question says which field is wrong."""
    assert refusal(client, path, body) == (422, "invalid_field")


FORM = "application/x-www-form-urlencoded"


@pytest.mark.parametrize("media_type", ["", "text/plain", "application/jsonx", FORM, "multipart/form-data; boundary=x"])
def test_only_json_is_read(client, media_type):
    """A body that is not declared as JSON is refused unparsed."""
    reply = client.post("/v1/query", content=json.dumps(ASK), headers={"Content-Type": media_type})
    assert (reply.status_code, problem(reply)["code"]) == (415, "unsupported_media_type")


def test_a_form_of_a_million_fields(client):
    """A form is never parsed: below the cap it is the wrong type, above it too long."""
    for fields, status in ((20_000, 415), (1_000_000, 413)):
        assert client.post("/v1/query", content=b"a&" * fields, headers={"Content-Type": FORM}).status_code == status


@pytest.mark.parametrize("path", WORK)
@pytest.mark.parametrize(
    "field", ["tenant", "where", "model", "snapshot_id", "path", "url", "groups", "nprobes", "__class__", "Query", "\u202equery"]
)
def test_unknown_fields(client, field, path):
    """Whatever is not in the contract is refused by name; nobody chooses a model, a snapshot, a tenant or a raw filter."""
    assert refusal(client, path, {"query": "a", field: "b"}) == (422, "unknown_field")


# the query

EMPTY = ["", " ", "\t\r\n", "\u200b", "\u202e\u2066", "\ufeff", "\ue000"]
UNREADABLE = ["\x00", "a\x07b", "\x1b[31mred", "\ud800", "a\udc00", "a" + "\u0301" * 31, "\u0301" * 10_000, "\x7f"]


@pytest.mark.parametrize("path", WORK)
@pytest.mark.parametrize(
    ("query", "code"),
    [
        *((query, "empty_query") for query in EMPTY),
        *((query, "invalid_characters") for query in UNREADABLE),
        *((query, "query_too_long") for query in ("x" * 4001, "x" * 60_000)),
    ],
    ids=short,
)
def test_no_question_in_the_query(client, query, code, path):
    """A query without anything to read, with what is no text, or too long has a code of its own; nothing is cut off in silence."""
    assert refusal(client, path, json.dumps({"query": query}).encode()) == (422, code)


TEXTS = [
    "🙂🙂🙂",
    "如何删除存储桶",
    "كيف أحذف الدلو",
    "Как удалить бакет?",
    'delete AND (bucket OR "',
    "e\u0301" * 100,
    "\u202ebucket",
    "*",
    "a\tb\nc",
    "x" * 4000,
    "\ufdfa" * 200,
    "a' OR '1'='1",
    "a'; DROP TABLE chunks; --",
    "{{7*7}}",
    "-" * 500,
    "\U0010fffd bucket",
]


@pytest.mark.parametrize(
    "query",
    TEXTS,
    ids=short,
)
def test_any_text_is_answered(client, query):
    """Emoji, other scripts, right-to-left text, query syntax, SQL, templates, tabs and the longest query are questions like any other."""
    for path in WORK:
        assert client.post(path, json={"query": query}).status_code == 200


# numbers


@pytest.mark.parametrize("path", WORK)
@pytest.mark.parametrize("value", [0, -1, 51, 10**9, 1.5, 5.0, "5", True, [5], {}, 2**63])
def test_top_k_out_of_bounds(client, value, path):
    """top_k is an integer of 1 to 50 and nothing that could be read as one."""
    assert refusal(client, path, {"query": "a", "top_k": value}) == (422, "invalid_field")


@pytest.mark.parametrize("path", WORK)
@pytest.mark.parametrize("value", [0, 99, 60_001, -5, 1e3, "1000", False])
def test_deadline_out_of_bounds(client, value, path):
    """deadline_ms is an integer of 100 to 60,000."""
    assert refusal(client, path, {"query": "a", "deadline_ms": value}) == (422, "invalid_field")


@pytest.mark.parametrize(
    ("field", "value"), [("max_tokens", 10**6), ("max_tokens", 0), ("temperature", -1), ("temperature", 1e9), ("n", 2), ("messages", [])]
)
def test_chat_numbers_out_of_bounds(client, field, value):
    """What a chat client may not ask for is refused, with an error that it can read too."""
    body = {"model": "ragline", "messages": [{"role": "user", "content": "How do I delete a bucket?"}]} | {field: value}
    reply = client.post("/v1/chat/completions", json=body)
    assert (reply.status_code, reply.json()["error"]["code"]) == (422, "invalid_field")


# headers


def test_request_id(client):
    """A well-formed X-Request-Id comes back; any other is replaced, never echoed."""
    assert client.get("/livez", headers={"X-Request-Id": "order-66.b_c"}).headers["x-request-id"] == "order-66.b_c"
    for bad in ("a b", "x" * 65, "<script>", "é".encode()):
        assert re.fullmatch(r"[0-9a-f]{32}", client.get("/livez", headers={"X-Request-Id": bad}).headers["x-request-id"])


@pytest.mark.parametrize("folded", [b"a\r\n Set-Cookie: b", b"a\nSet-Cookie: b", b"a\rSet-Cookie: b", b"a%0d%0aSet-Cookie:b"])
def test_no_header_through_the_request_id(client, folded):
    """Line ends in X-Request-Id put no header into the reply."""
    reply = sent(client, b"GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nX-Request-Id: " + folded + b"\r\n\r\n")
    assert reply
    assert b"set-cookie" not in reply.partition(b"\r\n\r\n")[0].lower()


def test_trace_id(client):
    """A valid traceparent is continued; a malformed, oversized or zero one starts a new trace."""
    ours = "0af7651916cd43dd8448eb211c80319c"
    ask = {"json": ASK}
    assert client.post("/v1/query", headers={"traceparent": f"00-{ours}-b7ad6b7169203331-01"}, **ask).json()["trace_id"] == ours
    for bad in (f"00-{ours}-b7ad6b7169203331", f"00-{'0' * 32}-b7ad6b7169203331-01", f"00-{ours}-b7ad6b7169203331-01" * 200, "x"):
        trace_id = client.post("/v1/query", headers={"traceparent": bad}, **ask).json()["trace_id"]
        assert re.fullmatch(r"[0-9a-f]{32}", trace_id)
        assert trace_id != ours


def test_baggage_is_left_outside(made):
    """What a client puts into baggage or tracestate is in no attribute of any span."""
    settings, store = made
    spans, tracing = InMemorySpanExporter(), TracerProvider()
    tracing.add_span_processor(SimpleSpanProcessor(spans))
    with running(app.create_app(settings, store=store, tracing=tracing), ready_path="/readyz") as url:
        import httpx2

        headers = {"baggage": "user=tripwire,x=" + "y" * 8000, "tracestate": "tripwire=1"}
        assert httpx2.post(f"{url}/v1/retrieve", json=ASK, headers=headers, trust_env=False).status_code == 200
    assert spans.get_finished_spans()
    assert not [span for span in spans.get_finished_spans() if "tripwire" in span.to_json()]


def test_ranges_are_ignored(client):
    """A Range header, however long, gives the whole file."""
    reply = client.get("/static/app.js", headers={"Range": "bytes=" + ",".join(f"{at}-{at}" for at in range(500))})
    assert (reply.status_code, "content-range" in reply.headers) == (200, False)


# addresses and ids


@pytest.mark.parametrize("name", ["../app.py", "..%2fapp.py", "%2e%2e/app.py", "app.py", "nothing.css", "index.html%00", "a" * 300])
def test_only_the_page_is_served(client, name):
    """No other file can be reached through /static."""
    assert client.get(f"/static/{name}").status_code == 404


@pytest.mark.parametrize(
    "path", ["/v1/chunks/x", "/v1/snapshots/..%2f..%2fetc", "/admin/promote", "/docs", "/v1/query/", "//v1/query", "/%00"]
)
def test_unknown_addresses(client, path):
    """There is nothing elsewhere, and a missing thing looks like one that may not be seen."""
    reply = client.get(path)
    assert (reply.status_code, problem(reply)["code"]) == (404, "not_found")


@pytest.mark.parametrize(
    "snapshot_id",
    ["../../etc", "%2e%2e%2f", "/etc/passwd", "a\x00b", "x" * 300, "CON", "trailing.", "UPPER-case-1", "short", "white space"],
)
def test_no_path_in_a_snapshot_id(client, snapshot_id):
    """What is no snapshot id is refused before anything is looked up."""
    assert refusal(client, "/v1/feedback", {"query": "a", "verdict": "up", "snapshot_id": snapshot_id}) == (422, "invalid_field")
