"""Rates on a monotonic clock: how many events of a key are allowed in a period.

``limits`` counts, and its own storage in memory reads the system's time: when that is set back, callers wait
for the difference. The storage here has a clock of its own.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from limits import parse as parse_limit
from limits.aio.storage import MovingWindowSupport, SlidingWindowCounterSupport, Storage
from limits.aio.strategies import MovingWindowRateLimiter, SlidingWindowCounterRateLimiter

MAX_EXACT_EVENTS = 1_000
"""Highest rate that is counted exactly, which takes a timestamp for each event; a higher one is approximated
with two counters."""

MIN_SWEEP_KEYS = 1_024
"""Number of keys from which on those whose events have expired are looked for."""


def per_second(rate: str) -> float:
    """Events in a second that a rate allows in the long run, to compare two rates."""
    limit = parse_limit(rate)
    return limit.amount / limit.get_expiry()


@dataclass(frozen=True)
class Window:
    """The state of a key: how many events are left, and in how many seconds the next one comes free."""

    remaining: int
    reset_s: float


class Rate:
    """Counts the events of keys in this process's memory. For one event loop.

    Args:
        rate: A number and a period, for example ``60/minute``.
        clock: Monotonic, in seconds.
        storage: Where the events are counted; several rates may share one, which keeps them apart.
    """

    def __init__(
        self,
        rate: str,
        clock: Callable[[], float] = time.monotonic,
        storage: "MonotonicStorage | None" = None,
    ) -> None:
        self._limit = parse_limit(rate)
        self._clock = clock
        self._storage = storage or MonotonicStorage(clock)
        self._exact = self._limit.amount <= MAX_EXACT_EVENTS
        strategy = MovingWindowRateLimiter if self._exact else SlidingWindowCounterRateLimiter
        self._limiter = strategy(self._storage)

    @property
    def amount(self) -> int:
        """The number of events allowed in a period."""
        return self._limit.amount

    @property
    def period_s(self) -> int:
        """The length of the period."""
        return self._limit.get_expiry()

    @property
    def exact(self) -> bool:
        """Whether each event is counted by its moment, and not by two counters."""
        return self._exact

    async def hit(self, key: str) -> bool:
        """Count an event if it is allowed; whether it is."""
        return await self._limiter.hit(self._limit, key)

    async def test(self, key: str) -> bool:
        """Whether another event is allowed; counts nothing."""
        return await self._limiter.test(self._limit, key)

    async def window(self, key: str) -> Window:
        """The state of a key."""
        stats = await self._limiter.get_window_stats(self._limit, key)
        # The counters' strategy adds the seconds to the system's time, which it reads itself.
        now = self._clock() if self._exact else time.time()
        return Window(max(0, stats.remaining), min(max(0.0, stats.reset_time - now), float(self.period_s)))


class MonotonicStorage(Storage, MovingWindowSupport, SlidingWindowCounterSupport):
    """Storage of ``limits`` in memory, on a clock of its own; nothing in it waits, so it needs no lock.

    Args:
        clock: Monotonic, in seconds.
    """

    STORAGE_SCHEME = None

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._events: dict[str, tuple[int, deque[float]]] = {}
        """By key, the period and the moments of the events in it, oldest first."""
        self._counters: dict[str, tuple[int, int, int, int]] = {}
        """By key, the period, the number of the current one, and the events in it and in the one before."""
        self._sweep_at = MIN_SWEEP_KEYS

    @property
    def base_exceptions(self) -> type[Exception]:
        """Nothing here raises an exception of its own."""
        return ValueError

    async def acquire_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        """Count events if the moving window has room for them."""
        moments = self._window(key, expiry)
        if len(moments) + amount > limit:
            return False
        moments.extend([self._clock()] * amount)
        self._events[key] = expiry, moments
        self._sweep()
        return True

    async def get_moving_window(self, key: str, limit: int, expiry: int) -> tuple[float, int]:
        """Return the moment of the oldest event in the window, or now, and the number of events."""
        del limit
        moments = self._window(key, expiry)
        return (moments[0] if moments else self._clock()), len(moments)

    def _window(self, key: str, expiry: int) -> deque[float]:
        moments = self._events.get(key, (expiry, deque[float]()))[1]
        started = self._clock() - expiry
        while moments and moments[0] <= started:
            moments.popleft()
        return moments

    async def acquire_sliding_window_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        """Count events if the weighted counters of this period and the one before have room for them."""
        period, current, previous, left_s = self._counted(key, expiry)
        if int(previous * left_s / expiry + current) + amount > limit:
            return False
        self._counters[key] = expiry, period, current + amount, previous
        self._sweep()
        return True

    async def get_sliding_window(self, key: str, expiry: int) -> tuple[int, float, int, float]:
        """Return the counter of the period before and its seconds left, then those of this period."""
        _period, current, previous, left_s = self._counted(key, expiry)
        return previous, left_s if previous else 0.0, current, left_s + expiry

    async def clear_sliding_window(self, key: str, expiry: int) -> None:
        """Forget the counters of a key."""
        del expiry
        self._counters.pop(key, None)

    def _counted(self, key: str, expiry: int) -> tuple[int, int, int, float]:
        """Return the number of the period, the events in it and in the one before, and its seconds left."""
        now = self._clock()
        period = int(now // expiry)
        _expiry, counted, current, previous = self._counters.get(key, (expiry, period, 0, 0))
        if counted != period:
            current, previous = 0, current if counted == period - 1 else 0
        return period, current, previous, expiry - now % expiry

    def _sweep(self) -> None:
        """Forget expired keys, each time that the number of keys has doubled."""
        if len(self._events) + len(self._counters) < self._sweep_at:
            return
        now = self._clock()
        for key, (expiry, moments) in list(self._events.items()):
            if moments[-1] <= now - expiry:
                del self._events[key]
        for key, (expiry, period, _current, _previous) in list(self._counters.items()):
            if now // expiry > period + 1:
                del self._counters[key]
        self._sweep_at = max(MIN_SWEEP_KEYS, 2 * (len(self._events) + len(self._counters)))

    async def check(self) -> bool:
        """Memory is always there."""
        return True

    async def clear(self, key: str) -> None:
        """Forget a key."""
        self._events.pop(key, None)
        self._counters.pop(key, None)

    async def reset(self) -> int:
        """Forget everything; returns the number of keys."""
        keys = len(self._events) + len(self._counters)
        self._events.clear()
        self._counters.clear()
        return keys

    async def incr(self, key: str, expiry: int, amount: int = 1) -> int:
        """Refuse: fixed windows are not supported."""
        raise NotImplementedError

    async def get(self, key: str) -> int:
        """Refuse: fixed windows are not supported."""
        raise NotImplementedError

    async def get_expiry(self, key: str) -> float:
        """Refuse: fixed windows are not supported."""
        raise NotImplementedError
