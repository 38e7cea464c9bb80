"""Limits the model calls of each caller, and describes the nearest limit in the answer's header fields."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import cachetools

from service.context import RateFacts, current_request
from service.errors import RateLimitError
from service.identity.principal import Principal, Scope
from service.shared.counts import Counts, How, Limit, LocalCounts
from service.telemetry.instruments import Instruments
from service.utils.rates import Events, Rate, Window

MAX_RATES: Final = 1_000
"""How many different rates are kept parsed; what they count is kept elsewhere."""


@dataclass(frozen=True, slots=True)
class RateState:
    """A rate limit, and what is left of it.

    Args:
        scope: Whose it is.
        rate: The limit, for example ``60/minute``.
        quota: Calls permitted in a window.
        window_s: Length of the window in seconds.
        left: Calls left.
        reset_s: Seconds until a call is available again.
    """

    scope: Scope
    rate: str
    quota: int
    window_s: int
    left: int
    reset_s: float


_Named = tuple[Scope, str]
"""Whose a limit is, and its rate as text."""


class RateLimiter:
    """Counts the calls of each user, key and team in a window.

    Args:
        rate: What each user may do who has no rate of their own, for example ``60/minute``.
        instruments: Counts rejections.
        counts: Where they are counted; without, in this process's memory.
        clock: Monotonic, in seconds.
    """

    def __init__(
        self,
        rate: str,
        instruments: Instruments,
        counts: Counts | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rate = rate
        self._counts = counts or LocalCounts()
        self._clock = clock
        self._events = Events(clock)
        self._parsed: cachetools.LRUCache[str, Rate] = cachetools.LRUCache(MAX_RATES)
        self._rejected = instruments.requests_rejected

    def rate_of(self, caller: Principal) -> str:
        """What the caller's user may do."""
        for own in caller.limits:
            if own.scope == "user":
                return own.limits.rate or self._rate
        return self._rate

    async def count(self, caller: Principal) -> None:
        """Count one call, and leave the state of the nearest limit for the answer's header fields.

        A call that one limit does not permit is counted against none.

        Raises:
            RateLimitError: A limit is used up.
        """
        named, limits = self._limits(caller, "together")
        counted = await self._counts.count(limits)
        nearest = _nearest(counted.windows)
        rate, window = limits[nearest].rate, counted.windows[nearest]
        reset_s = max(1, round(window.reset_s))
        request = current_request.get()
        if request is not None:
            policy = f"per-{named[nearest][0]}"
            request.rate = RateFacts(policy, rate.amount, rate.period_s, window.remaining, reset_s)
        if not counted.allowed:
            self._rejected.add(1, {"reason": "rate_limited"})
            raise RateLimitError(
                "You have made too many calls. Wait for the seconds in Retry-After, then try again.",
                retry_after_s=reset_s,
            )

    async def nearest(self, caller: Principal) -> RateState:
        """The limit with the fewest calls left, and of equal ones the one with the longest wait."""
        named, limits = self._limits(caller, "look")
        windows = (await self._counts.count(limits)).windows
        nearest = _nearest(windows)
        (scope, text), rate, window = named[nearest], limits[nearest].rate, windows[nearest]
        return RateState(scope, text, rate.amount, rate.period_s, window.remaining, window.reset_s)

    def _limits(self, caller: Principal, how: How) -> tuple[list[_Named], list[Limit]]:
        """All that apply."""
        user_rate = self.rate_of(caller)
        named: list[_Named] = [("user", user_rate)]
        limits = [Limit(self._of(user_rate), f"user {caller.username}", how)]
        for own in caller.limits:
            if own.limits.rate is not None and own.scope != "user":
                named.append((own.scope, own.limits.rate))
                limits.append(Limit(self._of(own.limits.rate), f"{own.scope} {own.name}", how))
        return named, limits

    def _of(self, rate: str) -> Rate:
        found = self._parsed.get(rate)
        if found is None:
            found = self._parsed[rate] = Rate(rate, self._clock, self._events)
        return found


def _nearest(windows: Sequence[Window]) -> int:
    """Which of the limits has the fewest calls left, and of equal ones the longest wait."""
    if len(windows) == 1:
        return 0
    return min(range(len(windows)), key=lambda at: (windows[at].remaining, -windows[at].reset_s))
