"""What the services write: one event a line, with the trace id of the request it belongs to, without secrets and personal data.

`json` is for machines: an object a line. `plain` is for people: control characters are written out, and the lines of a traceback are set in,
so that no text can pass for an event of its own. Questions, passages and answers are not logged: what goes wrong while a request is under way
is told by where it was raised and by what kind of error, and in words only where they are ours.
"""

import json
import logging
import re
import sys
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import IO, Any, Literal

from opentelemetry.trace import get_current_span

from rag_serving.errors import in_log
from rag_serving.signals.redaction import redacted, redacted_attributes

Format = Literal["plain", "json"]

_OF_REQUESTS = ("uvicorn.error", "asyncio")  # they tell what a request left behind, when its trace has ended
_CHATTY = ("httpx2", "httpcore2", "openai", "watchfiles")  # at INFO they log the address of every request
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "color_message", "taskName"}


class Lines(logging.Formatter):
    """A record as a line, redacted. What a caller passes as `extra` becomes fields of its own."""

    def __init__(self, form: Format) -> None:
        super().__init__()
        self._form = form

    def format(self, record: logging.LogRecord) -> str:
        event = _event(record)
        if self._form == "json":
            return json.dumps(event, default=str)
        error = event.pop("error", "")
        head = f"{event.pop('time')} {event.pop('level').upper():<7} {event.pop('logger')}: {event.pop('message')}"
        rest = " ".join(f"{name}={value}" for name, value in event.items())
        return "\n    | ".join(_CONTROL.sub(_written_out, line) for line in [f"{head} {rest}".rstrip(), *error.splitlines()])


def configure(form: Format, level: str, *, stream: IO[str] | None = None) -> None:
    """Send everything that this process logs to `stream` (stderr) in this form, warnings of Python included."""
    output = logging.StreamHandler(stream or sys.stderr)
    output.setFormatter(Lines(form))
    root = logging.getLogger()
    root.handlers[:] = [output]
    root.setLevel(level.upper())
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    for name in _CHATTY:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
    logging.captureWarnings(capture=True)


def _event(record: logging.LogRecord) -> dict[str, Any]:
    try:
        message = record.getMessage()
    except (TypeError, ValueError, KeyError):
        message = f"{record.msg} (with {record.args!r}, which do not fit)"
    event: dict[str, Any] = {
        "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "level": record.levelname.lower(),
        "logger": record.name,
        "message": redacted(message),
    }
    span = get_current_span().get_span_context()
    working = span.is_valid or record.name in _OF_REQUESTS
    if record.name == "asyncio":
        event["message"] = event["message"].partition("\n")[0]  # below stands the task, with its error in full
    if span.is_valid:
        event |= {"trace_id": format(span.trace_id, "032x"), "span_id": format(span.span_id, "016x")}
    extra = {name: value if isinstance(value, bool | int | float) else str(value) for name, value in record.__dict__.items()}
    event |= redacted_attributes({name: value for name, value in extra.items() if name not in _STANDARD and name not in event})
    if record.exc_info and record.exc_info[1] is not None:
        told = "".join(_frames(record.exc_info[1])) if working else logging.Formatter().formatException(record.exc_info)
        event["error"] = redacted(told.rstrip())
    return event


def _frames(error: BaseException) -> Iterator[str]:
    """A traceback whose errors are told as `in_log` tells them; of a chain, what was raised first stands first."""
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if before is not None:
        yield from _frames(before)
        yield "then:\n"
    if isinstance(error, BaseExceptionGroup):
        for each in error.exceptions:
            yield from _frames(each)
            yield "within:\n"
    yield from traceback.format_tb(error.__traceback__)
    yield f"{in_log(error)}\n"


def _written_out(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape", "surrogatepass").decode()
