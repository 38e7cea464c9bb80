"""Limits the model calls of each user, and describes the limit in the answer's header fields."""

import time
from collections.abc import Callable

from limits import parse as parse_limit
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import MovingWindowRateLimiter, SlidingWindowCounterRateLimiter

from service.context import RateFacts, current_request
from service.errors import RateLimitError
from service.telemetry.instruments import Instruments

MAX_EXACT_CALLS = 1_000
"""Highest limit that is counted exactly, which takes a timestamp for each call; a higher one is approximated
with two counters."""


class RateLimiter:
    """Counts the calls of each user in a window, in this process's memory.

    Args:
        rate: A number and a period, for example ``60/minute``.
        instruments: Counts rejections.
        now: Unix time in seconds.
    """

    def __init__(self, rate: str, instruments: Instruments, now: Callable[[], float] = time.time) -> None:
        self._limit = parse_limit(rate)
        exact = self._limit.amount <= MAX_EXACT_CALLS
        strategy = MovingWindowRateLimiter if exact else SlidingWindowCounterRateLimiter
        self._limiter = strategy(MemoryStorage())
        self._rejected = instruments.requests_rejected
        self._now = now

    async def count(self, user: str) -> None:
        """Count one call, and leave the state of the limit for the answer's header fields.

        Raises:
            RateLimitError: The user has used up the limit.
        """
        allowed = await self._limiter.hit(self._limit, "calls", user)
        stats = await self._limiter.get_window_stats(self._limit, "calls", user)
        reset_s = max(1, round(stats.reset_time - self._now()))
        request = current_request.get()
        if request is not None:
            request.rate = RateFacts(
                self._limit.amount, self._limit.get_expiry(), max(0, stats.remaining), reset_s
            )
        if not allowed:
            self._rejected.add(1, {"reason": "rate_limited"})
            raise RateLimitError(
                "You have made too many calls. Wait for the seconds in Retry-After, then try again.",
                retry_after_s=reset_s,
            )
