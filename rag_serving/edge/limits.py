"""What a server takes in: request bodies are bounded in size, and in time when asked, before anything reads them."""

import asyncio
from collections.abc import Callable

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class BodyLimit:
    """Refuses request bodies above `most_bytes` with 413, by their stated length or while they arrive.

    With `seconds`, a body that has not arrived whole by then is refused with 408. `refusal(status, message)` makes the reply to a stated
    length; what is found while a body arrives is raised as HTTPException where the body is read.
    """

    def __init__(
        self, app: ASGIApp, *, most_bytes: int, too_long: str, refusal: Callable[[int, str], ASGIApp], seconds: float | None = None
    ) -> None:
        self._app = app
        self._most_bytes = most_bytes
        self._too_long = too_long
        self._refusal = refusal
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        stated = dict(scope["headers"]).get(b"content-length", b"0")
        if stated.isdigit() and int(stated[:20]) > self._most_bytes:
            await self._refusal(413, self._too_long)(scope, receive, send)
            return
        loop = asyncio.get_running_loop()
        deadline = None if self._seconds is None else loop.time() + self._seconds
        seen, arriving = 0, True

        async def counted() -> Message:
            nonlocal seen, arriving
            try:
                async with asyncio.timeout_at(deadline if arriving else None):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"The body did not arrive within {self._seconds:g} s.") from None
            arriving = bool(message.get("more_body", False))
            seen += len(message.get("body", b""))
            if seen > self._most_bytes:
                raise HTTPException(413, self._too_long)
            return message

        await self._app(scope, counted, send)
