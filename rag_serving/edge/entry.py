"""The order at the edge: size cap, who asks, how often, what is asked, and whether there is room. Work begins after all five.

The size cap stands before (limits.py). `Entry` does the rest before FastAPI sees a request, so that turning away costs little when there is
much to turn away; what a route asks of its callers it says with `Depends(Door(...))`.
"""

import asyncio
import logging
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from typing import Annotated, Any, Generic

from fastapi import APIRouter, Request, Security
from fastapi.routing import APIRoute
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from opentelemetry.trace import Tracer
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from rag_serving import telemetry
from rag_serving.admission import Body, admit_body
from rag_serving.canary import conversation_of
from rag_serving.deadline import Deadline
from rag_serving.edge.caller import Caller
from rag_serving.edge.idempotency import Remembered
from rag_serving.edge.keys import PREFIX, KeyRing, unauthorized
from rag_serving.edge.quotas import Quotas, tokens_of
from rag_serving.edge.sending import due
from rag_serving.edge.shedding import Slots
from rag_serving.errors import AccessError
from rag_serving.exchange import Exchange
from rag_serving.settings import Settings
from rag_serving.store import Store

MOST_REMEMBERED = 10_000
PACE_SECONDS = 0.1
_KEY_NAMES = frozenset({"key", "api_key", "apikey", "api-key", "token", "access_token", "authorization"})
_BEARER = HTTPBearer(auto_error=False, scheme_name="API key", description="A key made by `ragline keys create`.")

audit = logging.getLogger("rag_serving.audit")


class Edge:
    """What one serving process knows of keys, quotas and room."""

    def __init__(self, settings: Settings, store: Store) -> None:
        self.keys = KeyRing(store, poll_seconds=settings.access.poll_seconds)
        self.quotas = Quotas(settings.access)
        self.slots = Slots(settings.admission.concurrency, settings.admission.queue)
        self.feedback: Remembered[Any] = Remembered(MOST_REMEMBERED)
        self.deadline_seconds = settings.serving.deadline_seconds
        self._pacing: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await self.keys.start()
        self._pacing = asyncio.create_task(self._pace())

    async def stop(self) -> None:
        await self.keys.stop()
        if self._pacing is not None:
            self._pacing.cancel()
            with suppress(asyncio.CancelledError):
                await self._pacing

    async def _pace(self) -> None:
        while True:
            due = time.monotonic() + PACE_SECONDS
            await asyncio.sleep(PACE_SECONDS)
            self.slots.pace(time.monotonic() - due)


@dataclass(slots=True)
class Asked(Generic[Body]):
    """A request that was let in: what it asks, and the exchange that answers it. `tokens` is what it costs its key's daily budget."""

    body: Body
    raw: bytes
    exchange: Exchange
    tokens: int = 0

    def spend(self, *texts: str) -> None:
        """Put these texts, asked or answered, on the key's account."""
        self.tokens += tokens_of(sum(len(text) for text in texts))


class Door(Generic[Body]):
    """What a route asks of its callers: a key with a scope and, with `model`, a body like it, for which they get a slot.

    As a dependency it gives the route what `Entry` let in, None without a model. Without Entry the route fails: it is never open by mistake.
    """

    def __init__(self, scope: str, model: type[Body] | None = None) -> None:
        self.scope = scope
        self.model = model

    async def __call__(
        self, request: Request, _shown: Annotated[HTTPAuthorizationCredentials | None, Security(_BEARER)]
    ) -> Asked[Body] | None:
        asked: Asked[Body] | None = request.state.asked
        return asked


def doors(routes: APIRouter) -> dict[tuple[str, str], Door[Any]]:
    """The doors of these routes, by method and path."""
    found = [route for route in routes.routes if isinstance(route, APIRoute)]
    asking = [(route, each.call) for route in found for each in route.dependant.dependencies if isinstance(each.call, Door)]
    return {(method, route.path): door for route, door in asking for method in route.methods or ()}


class Entry:
    """Lets requests through the doors of their addresses, or raises why not; addresses without a door are open.

    A request whose door has a model holds its slot until the reply was sent. What it cost is put on its key's account then.
    """

    def __init__(self, app: ASGIApp, *, edge: Edge, tracer: Tracer, doors: Mapping[tuple[str, str], Door[Any]]) -> None:
        self._app = app
        self._edge = edge
        self._tracer = tracer
        self._doors = doors

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if "\n" in scope["path"]:  # at the end of a path the routes, which match up to a `$`, would not see it
            raise HTTPException(404, "Not Found")
        door = self._doors.get((scope["method"], scope["path"]))
        if door is None:
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive)
        caller = await self._caller(request, door.scope)
        if door.model is None:
            request.state.asked = None
            await self._app(scope, receive, send)
            return
        async with AsyncExitStack() as held:
            request.state.asked = asked = await self._admitted(request, caller, door.model, held)
            try:
                await self._app(scope, receive, send)
            finally:
                await self._edge.quotas.spend(caller, asked.tokens)

    async def _caller(self, request: Request, scope: str) -> Caller:
        """Who asks, with a key of this scope and within its limits. AccessError, LimitExceeded."""
        shown = await _BEARER(request)
        caller = self._edge.keys.caller_of(shown.credentials if shown else "")
        if not caller.anonymous and _key_in_address(request):
            raise unauthorized()
        if scope not in caller.scopes:
            refused = f"{request.method} {request.scope['path']}, trace {request.state.trace_id}"
            audit.warning("key %s (%s) without scope %s was refused %s", caller.name, caller.key_id, scope, refused)
            raise AccessError(f"this key has no scope {scope!r}.", fix="Use a key with that scope.", code="forbidden")
        if not caller.anonymous:
            telemetry.known(caller.key_id)
        await self._edge.quotas.check(caller)
        return caller

    async def _admitted(self, request: Request, caller: Caller, model: type[Body], held: AsyncExitStack) -> Asked[Body]:
        """What is asked, with a slot that `held` gives back.

        A `deadline_ms` in the body can only shorten the time a request has, which runs from the moment its headers are there.
        """
        arrived = time.monotonic()
        exchange = Exchange(
            request.state.trace_id,
            self._tracer,
            Deadline(arrived + self._edge.deadline_seconds),
            caller=caller,
            request_id=request.state.request_id,
            conversation=conversation_of(request.headers),
        )
        raw = await request.body()
        with exchange.phase("admit"):
            body = admit_body(request.headers.get("content-type", ""), raw, model)
            wanted = getattr(body, "deadline_ms", None)
            if wanted is not None:
                exchange.deadline = Deadline(min(exchange.deadline.at, arrived + wanted / 1000))
            due(request.scope, exchange.deadline)
            await held.enter_async_context(self._edge.slots.held(exchange.caller.key_id, exchange.deadline))
        if await request.is_disconnected():
            raise ClientDisconnect
        return Asked(body, raw, exchange)


def _key_in_address(request: Request) -> bool:
    return any(name.lower() in _KEY_NAMES or value.startswith(PREFIX) for name, value in request.query_params.multi_items())
