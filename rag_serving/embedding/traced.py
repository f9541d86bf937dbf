"""A span for each request of a service that has no frame of its own, in its caller's trace."""

from opentelemetry.trace import Tracer
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rag_serving.signals import trace


class Traced:
    """The first span of requests to declared routes; others pass unseen."""

    def __init__(self, app: ASGIApp, *, tracer: Tracer) -> None:
        self._app = app
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not trace.declared(scope["method"], scope["path"]):
            await self._app(scope, receive, send)
            return
        with trace.serving(self._tracer, scope["method"], scope["path"], Headers(scope=scope)) as request:

            async def seen(message: Message) -> None:
                if message["type"] == "http.response.start":
                    request.status = message["status"]
                await send(message)

            await self._app(scope, receive, seen)
