"""Who does not read a reply is left alone soon after the request's deadline, so that nothing is held for a client that stalls."""

import asyncio

from starlette.requests import ClientDisconnect
from starlette.types import Message, Scope, Send

from rag_serving.deadline import Deadline

GRACE_SECONDS = 1.0  # so long a reply that was made at the last moment may take to be read


def due(scope: Scope, deadline: Deadline) -> None:
    """The reply to this request has to be read a second after this deadline."""
    scope.setdefault("state", {})["due"] = Deadline(deadline.at + GRACE_SECONDS)


async def send_in_time(scope: Scope, send: Send, message: Message) -> None:
    """Send a part of a reply; ClientDisconnect when the client has not taken what came before in time, if that was said."""
    last: Deadline | None = scope.get("state", {}).get("due")
    if last is None:
        await send(message)
        return
    try:
        async with asyncio.timeout(last.remaining):
            await send(message)
    except TimeoutError:
        raise ClientDisconnect from None
