"""Limits the model calls of each user, and describes the limit in the answer's header fields."""

import time
from collections.abc import Callable

from service.context import RateFacts, current_request
from service.errors import RateLimitError
from service.telemetry.instruments import Instruments
from service.utils.rates import Rate


class RateLimiter:
    """Counts the calls of each user in a window, in this process's memory.

    Args:
        rate: A number and a period, for example ``60/minute``.
        instruments: Counts rejections.
        clock: Monotonic, in seconds.
    """

    def __init__(
        self, rate: str, instruments: Instruments, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._rate = Rate(rate, clock)
        self._rejected = instruments.requests_rejected

    async def count(self, user: str) -> None:
        """Count one call, and leave the state of the limit for the answer's header fields.

        Raises:
            RateLimitError: The user has used up the limit.
        """
        allowed = await self._rate.hit(user)
        window = await self._rate.window(user)
        reset_s = max(1, round(window.reset_s))
        request = current_request.get()
        if request is not None:
            request.rate = RateFacts(self._rate.amount, self._rate.period_s, window.remaining, reset_s)
        if not allowed:
            self._rejected.add(1, {"reason": "rate_limited"})
            raise RateLimitError(
                "You have made too many calls. Wait for the seconds in Retry-After, then try again.",
                retry_after_s=reset_s,
            )
