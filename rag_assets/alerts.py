"""Alerts: what a person should hear of soon goes to the log and, when RAGLINE_ALERT_URL is set, to a webhook.

The webhook gets a POST of JSON, in ragline's own shape or in the one of Slack's incoming webhooks (`text`, with &, < and > escaped).
"""

import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any
from urllib.parse import urlsplit

import httpx2

from rag_serving.settings import Settings

PATIENCE_SECONDS = 5.0
_PAUSES = (0.2, 0.8)  # before the second and the third try
_PASSING = {408, 425, 429}  # and 5xx: worth another try
_SLACK = ("slack.com", "slack-gov.com")

_log = logging.getLogger("ragline.alerts")
logging.getLogger("httpx2").setLevel(logging.WARNING)  # at INFO it logs the address of every request


class Severity(StrEnum):
    INFO = "info"
    WARNING = "warning"
    CRITICAL = "critical"


@dataclass(frozen=True, slots=True)
class Alert:
    """`event` is one word for machines, `text` one sentence for people, `facts` the numbers behind it, `at` an ISO time in UTC."""

    event: str
    severity: Severity
    text: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    at: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))


def send(settings: Settings, alert: Alert, *, patience_seconds: float = PATIENCE_SECONDS) -> bool:
    """Log the alert and post it; False when a webhook is configured and did not take it. Never raises; returns within `patience_seconds`.

    A refused connection, a 429 or a 5xx is tried three times in all. What was not delivered is logged; the address, which is a secret, is not.
    """
    level = {Severity.INFO: logging.INFO, Severity.WARNING: logging.WARNING, Severity.CRITICAL: logging.ERROR}[alert.severity]
    _log.log(level, "%s: %s", alert.event, " ".join(alert.text.split()))
    if settings.places.alert_url is None:
        return True
    url = settings.places.alert_url.get_secret_value()
    outcome: list[str] = []
    # a thread, since no timeout of a client covers name resolution and a reply that drips
    post = threading.Thread(target=lambda: outcome.append(_deliver(url, alert, settings.alerts.format, patience_seconds)), daemon=True)
    post.start()
    post.join(patience_seconds)
    problem = outcome[0] if outcome else f"no answer within {patience_seconds:g} s"
    if problem:
        _log.error("the alert %s was not delivered: %s", alert.event, problem)
    return not problem


def _deliver(url: str, alert: Alert, form: str, patience_seconds: float) -> str:
    """Post until it is taken; what went wrong, empty when it was taken."""
    problem = ""
    try:
        body = _slack_body(alert) if form == "slack" or (form == "auto" and _is_slack(url)) else _generic_body(alert)
        with httpx2.Client(timeout=patience_seconds) as client:
            for pause in (*_PAUSES, None):
                problem, again = _attempt(client, url, body)
                if not problem or not again or pause is None:
                    break
                time.sleep(pause)
    except Exception as error:  # noqa: BLE001 - an address or a fact of any kind may be wrong; none may stop the caller
        problem = type(error).__name__  # its text may quote the address
    return problem


def _attempt(client: httpx2.Client, url: str, body: Mapping[str, Any]) -> tuple[str, bool]:
    """What went wrong with one post, empty when it was taken, and whether another try may help."""
    try:
        with client.stream("POST", url, json=body) as reply:
            status = reply.status_code
    except httpx2.TransportError as error:
        return type(error).__name__, isinstance(error, httpx2.ConnectError)
    if 200 <= status < 300:
        return "", False
    return f"HTTP status {status}", status >= 500 or status in _PASSING


def _is_slack(url: str) -> bool:
    host = (urlsplit(url).hostname or "").lower()
    return any(host == name or host.endswith(f".{name}") for name in _SLACK)


def _generic_body(alert: Alert) -> dict[str, Any]:
    fields = asdict(alert)
    return {**fields, "facts": {name: _plain(value) for name, value in alert.facts.items()}}


def _slack_body(alert: Alert) -> dict[str, Any]:
    lines = [f"*{alert.severity.upper()} {_escaped(alert.event)}*  {_escaped(alert.text)}"]
    lines += [f"• {_escaped(name)}: {_escaped(_plain(value))}" for name, value in alert.facts.items()]
    return {"text": "\n".join(lines)}


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)


def _escaped(value: Any) -> str:
    return str(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
