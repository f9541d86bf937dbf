"""What surrounds every exchange over HTTP: trace id, request id, security headers, and a reply of our own for what nobody foresaw."""

import logging
import random
import re

from opentelemetry.trace import Tracer
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rag_serving.edge.origins import Origins
from rag_serving.edge.problems import for_openai, problem_of
from rag_serving.edge.sending import send_in_time
from rag_serving.errors import AccessError
from rag_serving.signals import trace

MOST_HEADER_BYTES = 16 << 10

_SECURITY = (
    (b"content-security-policy", b"default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; object-src 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
)
_NOT_KEPT = (b"cache-control", b"no-store")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

log = logging.getLogger(__name__)


class Frame:
    """Around every exchange: trace id, request id, security headers, and a reply of our own for what nobody foresaw."""

    def __init__(self, app: ASGIApp, *, tracer: Tracer, origins: Origins) -> None:
        self._app = app
        self._tracer = tracer
        self._origins = origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        with trace.serving(self._tracer, scope["method"], scope["path"], headers) as request:
            await self._exchange(scope, receive, send, headers, request)

    async def _exchange(self, scope: Scope, receive: Receive, send: Send, headers: Headers, seen: trace.Request) -> None:
        trace_id = seen.trace_id
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"{random.getrandbits(128):032x}"
        scope.setdefault("state", {})["trace_id"] = trace_id
        scope["state"]["request_id"] = request_id
        begun = False

        async def framed(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                seen.status = message["status"]
                own = message["headers"]
                kept = () if any(name == b"cache-control" for name, _ in own) else (_NOT_KEPT,)
                message["headers"] = [*own, (b"x-request-id", request_id.encode()), *kept, *_SECURITY]
            await send_in_time(scope, send, message)

        try:
            try:
                _require_short(scope)
                self._origins.check(scope["method"], headers)
                await self._app(scope, receive, framed)
            except Exception as error:
                if begun or isinstance(error, ClientDisconnect):
                    raise
                await problem_of(error, trace_id, openai=for_openai(scope["path"]))(scope, receive, framed)
        except ClientDisconnect:
            seen.gone = True
            log.info("trace %s: the client left", trace_id)
        except Exception:
            log.exception("trace %s failed", trace_id)
            raise


def _require_short(scope: Scope) -> None:
    if sum(len(name) + len(value) for name, value in scope["headers"]) > MOST_HEADER_BYTES:
        raise AccessError(
            f"the headers are longer than {MOST_HEADER_BYTES} bytes together.",
            fix="Send fewer or shorter headers.",
            code="headers_too_long",
        )
