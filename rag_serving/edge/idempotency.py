"""A request sent twice under one Idempotency-Key is done once: the second gets the first one's reply."""

import asyncio
import hashlib
import re
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from rag_serving.errors import QueryError

HEADER = "Idempotency-Key"
_VALUE = re.compile(r"[A-Za-z0-9._:-]{1,128}")

Reply = TypeVar("Reply")


class Remembered(Generic[Reply]):
    """The newest `most` replies of one process, by caller and key."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: OrderedDict[tuple[str, str], tuple[bytes, asyncio.Future[Reply]]] = OrderedDict()

    async def once(self, who: str, key: str, body: bytes, work: Callable[[], Awaitable[Reply]]) -> tuple[Reply, bool]:
        """The reply of `work`, and whether it was done before. Work that failed may be tried again; work under way is waited for.

        QueryError `invalid_field` for a malformed key, `idempotency_conflict` for one that came with another body.
        """
        if not _VALUE.fullmatch(key):
            raise QueryError(
                f"{HEADER} is not 1 to 128 letters, digits and . _ : - signs.", fix="Send a UUID, for example.", code="invalid_field"
            )
        digest = hashlib.sha256(body).digest()
        kept = self._kept.get((who, key))
        if kept is None:
            future = asyncio.ensure_future(work())
            self._kept[who, key] = (digest, future)
            future.add_done_callback(lambda done: self._forget_failed((who, key), done))
            while len(self._kept) > self._most:
                self._kept.popitem(last=False)
            return await asyncio.shield(future), False
        if kept[0] != digest:
            raise QueryError(
                f"this {HEADER} was used for another body.", fix="Take a new key for each new request.", code="idempotency_conflict"
            )
        return await asyncio.shield(kept[1]), True

    def _forget_failed(self, at: tuple[str, str], done: asyncio.Future[Reply]) -> None:
        if (done.cancelled() or done.exception() is not None) and (kept := self._kept.get(at)) and kept[1] is done:
            del self._kept[at]
