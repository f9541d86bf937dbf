"""What each API key may use: requests a minute and in a few seconds, tokens a day, counted in this process. Whoever needs no key is not counted.

The bound on a few seconds keeps a key that sends its whole minute at once from taking every slot that others wait for.
"""

import math
import time

from limits import RateLimitItem, RateLimitItemPerDay, RateLimitItemPerMinute, RateLimitItemPerSecond
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import FixedWindowRateLimiter, SlidingWindowCounterRateLimiter

from rag_serving.edge.caller import Caller
from rag_serving.errors import LimitExceeded
from rag_serving.settings import Access

CHARACTERS_A_TOKEN = 4


def tokens_of(characters: int) -> int:
    """Tokens of so many characters, as a rule of thumb for English: one for every four begun."""
    return math.ceil(characters / CHARACTERS_A_TOKEN)


class Quotas:
    """Counters of one process; they start afresh with it. The minute slides, the day begins with a key's first request."""

    def __init__(self, access: Access) -> None:
        storage = MemoryStorage()
        self._requests = SlidingWindowCounterRateLimiter(storage)
        self._tokens = FixedWindowRateLimiter(storage)
        self._rates: list[tuple[RateLimitItem, str]] = []
        if access.requests_per_minute:
            if access.burst_seconds:
                burst = math.ceil(access.requests_per_minute / 60 * access.burst_seconds)
                unit = f"requests in {access.burst_seconds} seconds"
                self._rates.append((RateLimitItemPerSecond(burst, multiples=access.burst_seconds), unit))
            self._rates.append((RateLimitItemPerMinute(access.requests_per_minute), "requests a minute"))
        self._per_day = RateLimitItemPerDay(access.tokens_per_day) if access.tokens_per_day else None

    async def check(self, caller: Caller) -> None:
        """Count one request. LimitExceeded `rate_limited` or `budget_exhausted`, with the seconds until there is room again."""
        if caller.anonymous:
            return
        for rate, unit in self._rates:
            if not await self._requests.hit(rate, caller.key_id):
                reset = (await self._requests.get_window_stats(rate, caller.key_id)).reset_time
                raise self._exceeded(rate, unit, "rate_limited", reset)
        if self._per_day and not await self._tokens.test(self._per_day, caller.key_id):
            reset = (await self._tokens.get_window_stats(self._per_day, caller.key_id)).reset_time
            raise self._exceeded(self._per_day, "tokens a day", "budget_exhausted", reset)

    async def spend(self, caller: Caller, tokens: int) -> None:
        """Note the tokens that a request took. The one that crosses the budget is answered; the next is refused."""
        if self._per_day and tokens > 0 and not caller.anonymous:
            await self._tokens.hit(self._per_day, caller.key_id, cost=tokens)

    @staticmethod
    def _exceeded(item: RateLimitItem, unit: str, code: str, reset: float) -> LimitExceeded:
        return LimitExceeded(
            f"this key may use {item.amount:,} {unit}.",
            fix="Try again after the seconds that Retry-After says, or ask for a higher limit.",
            code=code,
            retry_after=max(1, math.ceil(reset - time.time())),
        )
