"""What the services write."""

import io
import json
import logging
import re
import subprocess
import sys
import warnings

import pytest
from opentelemetry.sdk.trace import TracerProvider
from small_service import build, release, serving, settings_for

from rag_serving.errors import StoreError
from rag_serving.signals import logs
from rag_serving.store import LocalStore

FAKE = 'delete\n{"level": "critical", "message": "all is lost"}\r\n\x1b[2J\u2028end'


@pytest.fixture(autouse=True)
def kept():
    """Logging as it was, afterwards."""
    root = logging.getLogger()
    before = (root.handlers[:], root.level)
    yield
    root.handlers[:], root.level = before
    logging.captureWarnings(capture=False)


def written(form: str, level: str = "info") -> io.StringIO:
    stream = io.StringIO()
    logs.configure(form, level, stream=stream)
    return stream


def test_json_is_an_object_a_line():
    """Time, level, logger, message and what was passed as extra; a line end in a text makes no line of its own (row 74)."""
    stream = written("json")
    logging.getLogger("rag_serving.live").warning("asked %s", FAKE, extra={"code": "store", "release": 3})
    (line,) = stream.getvalue().splitlines()
    event = json.loads(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", event.pop("time"))
    assert event == {"level": "warning", "logger": "rag_serving.live", "message": f"asked {FAKE}", "code": "store", "release": 3}
    assert line.isascii()


def test_plain_cannot_be_faked():
    """A text with line ends and control characters stays on its line, written out; the lines of a traceback are set in."""
    stream = written("plain")
    log = logging.getLogger("rag_serving.live")
    try:
        int(FAKE)
    except ValueError:
        log.exception("asked %s", FAKE)
    first, *rest = stream.getvalue().split("\n")[:-1]
    assert re.fullmatch(r"\S+Z ERROR   rag_serving\.live: asked delete\\n\{.*\}\\r\\n\\x1b\[2J\\u2028end", first)
    assert rest
    assert all(line.startswith("    | ") for line in rest)
    assert "\x1b" not in stream.getvalue()


def test_trace_id():
    """An event of a request has the request's trace id and span id; others have none."""
    stream, log = written("json"), logging.getLogger("rag_serving")
    with TracerProvider().get_tracer("test").start_as_current_span("request") as span:
        log.info("in")
    log.info("out")
    inside, outside = map(json.loads, stream.getvalue().splitlines())
    assert inside["trace_id"] == format(span.get_span_context().trace_id, "032x")
    assert inside["span_id"] == format(span.get_span_context().span_id, "016x")
    assert "trace_id" not in outside


@pytest.mark.parametrize("form", ["plain", "json"])
def test_secrets_are_in_no_part(form):
    """Message, arguments, extra and the text of an exception are redacted (row 73)."""
    stream, secret = written(form), "jane@corp.example"
    try:
        {}[secret]
    except LookupError:
        logging.getLogger("x").exception("who is %s, password=%s", secret, "hunter2", extra={"caller": secret, "api_key": "hunter2"})
    assert secret not in stream.getvalue()
    assert "hunter2" not in stream.getvalue()
    assert "KeyError: '[email]'" in stream.getvalue()


def test_errors_of_a_request_are_told_without_their_words():
    """Within a request's trace, and of what a server tells of a request that broke, an error of a library is its kind and its place."""
    stream, word = written("json"), "zq-" + "wombat"

    def fail(kind: type[Exception]) -> None:
        try:
            {}[word]
        except KeyError as error:
            raise kind(f"about {word}") from error

    def logged(name: str, kind: type[Exception]) -> dict:
        stream.seek(0)
        stream.truncate()
        try:
            fail(kind)
        except Exception:
            logging.getLogger(name).exception("it failed")
        return json.loads(stream.getvalue())

    with TracerProvider().get_tracer("test").start_as_current_span("request"):
        told = logged("rag_serving", ValueError)["error"]
        assert told.splitlines()[-1] == "ValueError"
        assert "KeyError\nthen:\n" in told
        assert "{}[word]" in told
        assert word not in told
        assert logged("rag_serving", StoreError)["error"].endswith(f"about {word}")  # ours says what it says
    assert word not in logged("uvicorn.error", ValueError)["error"]
    assert word in logged("rag_serving", ValueError)["error"]  # at a start, say: nobody asked anything yet


def test_nothing_breaks_a_line():
    """Arguments that do not fit, values JSON has no form for and half characters still give one line."""
    stream, log = written("json"), logging.getLogger("x")
    log.error("%d of %s", "many", extra={"thing": object(), "half": "\ud800"})
    event = json.loads(stream.getvalue())
    assert "many" in event["message"]
    assert event["half"] == "\ud800"


def test_level_warnings_and_chatty_libraries():
    """The level holds for all; Python's warnings are events too; clients that log each address do not."""
    stream = written("json", "info")
    logging.getLogger("a").debug("too fine")
    logging.getLogger("httpx2").info("GET http://127.0.0.1")
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        logs.configure("json", "info", stream=stream)
        warnings.warn("old", DeprecationWarning, stacklevel=1)
    (line,) = stream.getvalue().splitlines()
    assert json.loads(line)["logger"] == "py.warnings"


def test_a_service_logs_no_question(tmp_path):
    """What a service logs of a request has its trace id, and nothing of its question, its headers or its key (rows 73 and 74)."""
    store, settings = LocalStore(tmp_path), settings_for(tmp_path)
    release(store, build(store, settings))
    stream, secret = written("json", "debug"), "sesame-" + "canary"
    with serving(settings, store) as client:  # nobody answers where its embedding service should be
        reply = client.post(
            f"/v1/query?api_key={secret}",
            json={"query": f'delete\n{{"level": "critical"}} {secret} jane@corp.example'},
            headers={"X-Request-Id": secret, "Cookie": f"session={secret}", "User-Agent": secret},
        ).json()
        client.post("/v1/query", content=f'{{"{secret}": 1}}', headers={"Content-Type": "application/json"})
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert "answering by words alone" in {event["message"][:24] for event in events if event.get("trace_id") == reply["trace_id"]}
    assert secret not in stream.getvalue()
    assert "corp.example" not in stream.getvalue()


SERVED = """
import logging, sys
from rag_serving.errors import StoreError
from rag_serving.signals import logs
logs.configure("json", "info")
import uvicorn
async def app(scope, receive, send):
    assert scope["type"] == "lifespan"
    await receive(); await send({"type": "lifespan.startup.failed", "message": "token=abc123"})
uvicorn.run(app, port=0, log_config=None)
"""


def test_the_server_logs_the_same_way():
    """What uvicorn says, its failures included, comes in our form and on stderr alone."""
    done = subprocess.run([sys.executable, "-c", SERVED], capture_output=True, text=True, timeout=60, check=False)
    events = [json.loads(line) for line in done.stderr.splitlines()]
    assert done.stdout == ""
    assert {event["logger"] for event in events} == {"uvicorn.error"}
    assert "token=[secret]" in {event["message"] for event in events}
