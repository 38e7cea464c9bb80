"""How many model calls a user may make, and what the answer's header fields say about it."""

import time
from collections.abc import Callable

from limits import parse as parse_limit
from limits.aio.storage import MemoryStorage, Storage
from limits.aio.strategies import MovingWindowRateLimiter, SlidingWindowCounterRateLimiter

from service.context import RateFacts, current_request
from service.errors import RateLimitError
from service.telemetry.instruments import Instruments

EXACT_UP_TO = 1_000


class RateLimiter:
    """Counts calls per user in a moving window; users are few, so memory is bounded.

    Args:
        rate: A number and a period, like ``60/minute``.
        instruments: Where rejections are counted.
        storage: Where the counters are kept; this process's memory, or one that several processes share.
        now: Unix time in seconds.
    """

    def __init__(
        self,
        rate: str,
        instruments: Instruments,
        storage: Storage | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._limit = parse_limit(rate)
        store = storage or MemoryStorage()
        # The moving window is exact and keeps a moment for each call; counters approximate many.
        exact = self._limit.amount <= EXACT_UP_TO
        self._limiter = MovingWindowRateLimiter(store) if exact else SlidingWindowCounterRateLimiter(store)
        self._rejected = instruments.requests_rejected
        self._now = now

    async def count(self, user: str) -> None:
        """Count one call, and leave the state of the limit for the answer's header fields.

        Raises:
            RateLimitError: The user has made as many calls as they may.
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
