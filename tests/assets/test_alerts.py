"""Alerts over real sockets: what a webhook receives, and that a bad one stops nobody."""

import json
import logging
import socket
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from pydantic import SecretStr

from rag_assets.alerts import Alert, Severity, send
from rag_serving.settings import Alerts, Places, Settings

HELD = Alert(
    "hold", Severity.CRITICAL, "MRR fell to 0.712 < 0.80", {"mrr": 0.712, "by": "drift_holds & co"}, at="2026-11-22T11:00:00+00:00"
)
SECRET = "T0K3N-of-the-webhook"


@pytest.fixture(autouse=True)
def direct(monkeypatch):
    """No proxy stands between these tests and loopback."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@contextmanager
def webhook(*statuses: int):
    """A server that answers these statuses in turn, then 200; gives its port and the bodies that it received."""
    received: list[dict] = []
    left = list(statuses)

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self):
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(left.pop(0) if left else 200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hook)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server.server_address[1], received
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def settings(tmp_path, port: int | None, form: str = "auto") -> Settings:
    url = None if port is None else SecretStr(f"http://127.0.0.1:{port}/{SECRET}")
    return Settings(root=tmp_path, alerts=Alerts(format=form), places=Places(alert_url=url))


def test_the_webhook_gets_event_severity_text_facts_and_time(tmp_path):
    """One POST of exactly these five fields; the call says that it was taken."""
    with webhook() as (port, received):
        assert send(settings(tmp_path, port), HELD)
    assert received == [
        {
            "event": "hold",
            "severity": "critical",
            "text": "MRR fell to 0.712 < 0.80",
            "facts": {"mrr": 0.712, "by": "drift_holds & co"},
            "at": "2026-11-22T11:00:00+00:00",
        }
    ]


def test_slack_gets_one_escaped_text(tmp_path):
    """With format slack the body is Slack's: a text with the numbers, in which &, < and > cannot make links or mentions."""
    with webhook() as (port, received):
        assert send(settings(tmp_path, port, "slack"), HELD)
    (body,) = received
    assert body == {"text": "*CRITICAL hold*  MRR fell to 0.712 &lt; 0.80\n• mrr: 0.712\n• by: drift_holds &amp; co"}


@pytest.mark.parametrize(
    ("url", "slack"),
    [
        ("https://hooks.slack.com/services/x", True),
        ("https://HOOKS.SLACK-GOV.COM/services/x", True),
        ("https://notslack.com/x", False),
        ("https://slack.com.example.org/x", False),
        ("https://example.org/hooks.slack.com", False),
    ],
)
def test_slack_is_known_by_its_host(url, slack):
    """Format auto looks at the host alone, and at all of it."""
    from rag_assets.alerts import _is_slack

    assert _is_slack(url) is slack


def test_a_busy_webhook_is_tried_again(tmp_path):
    """503 and 429 are followed by another try; the third succeeds."""
    with webhook(503, 429) as (port, received):
        assert send(settings(tmp_path, port), HELD)
    assert len(received) == 3


@pytest.mark.parametrize(("statuses", "tries"), [((500, 500, 500), 3), ((403,), 1), ((302,), 1)])
def test_a_refusing_webhook_is_logged_without_its_address(tmp_path, caplog, statuses, tries):
    """Three tries at an error of the server, one at a refusal or a redirect; then False, and a log line that has the status and no secret."""
    with webhook(*statuses) as (port, received), caplog.at_level(logging.INFO, "ragline.alerts"):
        assert not send(settings(tmp_path, port), HELD)
    assert len(received) == tries
    assert f"HTTP status {statuses[0]}" in caplog.text
    assert SECRET not in caplog.text


def test_the_address_is_in_no_log(tmp_path, caplog):
    """Also with every library logging at INFO, the webhook's address, which is a secret, is nowhere."""
    with webhook() as (port, _), caplog.at_level(logging.INFO):
        assert send(settings(tmp_path, port), HELD)
    assert "hold" in caplog.text
    assert SECRET not in caplog.text


def test_a_dead_webhook_raises_nothing(tmp_path, caplog):
    """Nobody listens: False, within two seconds, and the log has both the alert and that it was not delivered."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        started = time.monotonic()
        assert not send(settings(tmp_path, taken.getsockname()[1]), HELD)
    assert time.monotonic() - started < 4
    assert "hold: MRR fell to 0.712" in caplog.text
    assert "ConnectError" in caplog.text
    assert SECRET not in caplog.text


@pytest.mark.parametrize("reply", [b"", b"HTTP/1.1 2"], ids=["silent", "drips"])
def test_a_hanging_webhook_is_left_in_time(tmp_path, caplog, reply):
    """A server that takes the request and does not answer, or drips, costs no more than the patience given."""
    done = threading.Event()

    def hang(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            while reply and not done.wait(0.1):
                connection.sendall(reply)
            done.wait(10)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=hang, args=(listener,))
        thread.start()
        started = time.monotonic()
        assert not send(settings(tmp_path, listener.getsockname()[1]), HELD, patience_seconds=0.5)
        assert time.monotonic() - started < 3
        done.set()
        thread.join()
    assert "not delivered" in caplog.text


@pytest.mark.parametrize("url", ["no address", "http://[::1", "ftp://127.0.0.1/x", "http://\ud800/"])
def test_an_address_that_is_none_raises_nothing(tmp_path, caplog, url):
    """A malformed RAGLINE_ALERT_URL is logged by the kind of error and is not repeated."""
    places = Places.model_construct(alert_url=SecretStr(url))
    assert not send(Settings(root=tmp_path).model_copy(update={"places": places}), HELD)
    assert "not delivered" in caplog.text
    assert url not in caplog.text


def test_without_a_webhook_the_log_has_it(tmp_path, caplog):
    """No address configured: the alert is one log line, also when its text has several."""
    assert send(settings(tmp_path, None), Alert("drill_failed", Severity.CRITICAL, "too slow:\n41 s", {"thing": object()}))
    assert [record.getMessage() for record in caplog.records] == ["drill_failed: too slow: 41 s"]


def test_facts_of_any_kind_are_sent(tmp_path):
    """A fact that JSON does not know is sent as its text."""
    with webhook() as (port, received):
        assert send(settings(tmp_path, port), Alert("x", Severity.INFO, "y", {"folder": tmp_path, "none": None}))
    assert received[0]["facts"] == {"folder": str(tmp_path), "none": None}
