"""The order at the edge: size cap, who asks, how often, what is asked, and whether there is room. Work begins after all five.

The size cap stands before (limits.py); a route asks for the rest with `Depends(asked(Model, scope))`, or for the first two with
`Depends(allowed(scope))`.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from typing import Annotated, Any, Generic

from fastapi import Depends, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.requests import ClientDisconnect

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


def allowed(scope: str) -> Callable[..., Awaitable[Caller]]:
    """A dependency that gives the caller, whose key has this scope and is within its limits. AccessError, LimitExceeded."""

    async def check(request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Security(_BEARER)]) -> Caller:
        edge: Edge = request.app.state.edge
        caller = edge.keys.caller_of(credentials.credentials if credentials else "")
        if not caller.anonymous and _key_in_address(request):
            raise unauthorized()
        if scope not in caller.scopes:
            audit.warning(
                "key %s (%s) without scope %s was refused %s %s, trace %s",
                caller.name,
                caller.key_id,
                scope,
                request.method,
                request.scope["route"].path,
                request.state.trace_id,
            )
            raise AccessError(f"this key has no scope {scope!r}.", fix="Use a key with that scope.", code="forbidden")
        if not caller.anonymous:
            telemetry.known(caller.key_id)
        await edge.quotas.check(caller)
        return caller

    return check


def asked(model: type[Body], scope: str) -> Callable[..., AsyncIterator[Asked[Body]]]:
    """A dependency that lets a request in: its body as `model`, a slot until the reply was sent, and what it cost put on account.

    A `deadline_ms` in the body can only shorten the time a request has, which runs from the moment its headers are there.
    """

    async def let_in(request: Request, caller: Annotated[Caller, Depends(allowed(scope))]) -> AsyncIterator[Asked[Body]]:
        edge: Edge = request.app.state.edge
        arrived = time.monotonic()
        exchange = Exchange(
            request.state.trace_id,
            request.app.state.tracer,
            Deadline(arrived + edge.deadline_seconds),
            caller=caller,
            request_id=request.state.request_id,
            conversation=conversation_of(request.headers),
        )
        raw = await request.body()
        async with AsyncExitStack() as held:
            with exchange.phase("admit"):
                body = admit_body(request.headers.get("content-type", ""), raw, model)
                wanted = getattr(body, "deadline_ms", None)
                if wanted is not None:
                    exchange.deadline = Deadline(min(exchange.deadline.at, arrived + wanted / 1000))
                due(request.scope, exchange.deadline)
                await held.enter_async_context(edge.slots.held(caller.key_id, exchange.deadline))
            if await request.is_disconnected():
                raise ClientDisconnect
            admitted = Asked(body, raw, exchange)
            try:
                yield admitted
            finally:
                await edge.quotas.spend(caller, admitted.tokens)

    return let_in


def _key_in_address(request: Request) -> bool:
    return any(name.lower() in _KEY_NAMES or value.startswith(PREFIX) for name, value in request.query_params.multi_items())
