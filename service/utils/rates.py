"""Rates on a monotonic clock: how many events of a key are allowed in a period.

``limits`` reads what a rate says. Its own counting reads the system's time: when that is set back, callers
wait for the difference. What counts here has a clock of its own.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from limits import parse as parse_limit

MAX_EXACT_EVENTS = 1_000
"""Highest rate that is counted exactly, which takes a timestamp for each event; a higher one is approximated
with two counters."""

MIN_SWEEP_KEYS = 1_024
"""Number of keys from which on those whose events have expired are looked for."""

_Key = tuple[int, int, str]
"""The number and the period of a rate, and whose events these are."""


def per_second(rate: str) -> float:
    """Events in a second that a rate allows in the long run, to compare two rates."""
    limit = parse_limit(rate)
    return limit.amount / limit.get_expiry()


@dataclass(frozen=True, slots=True)
class Window:
    """The state of a key: how many events are left, and in how many seconds the next one comes free."""

    remaining: int
    reset_s: float


class Events:
    """The events of keys, in this process's memory; nothing in it waits, so it needs no lock.

    Args:
        clock: Monotonic, in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.moments: dict[_Key, deque[float]] = {}
        """By key, the moments of the events in the period, oldest first."""
        self.counters: dict[_Key, tuple[int, int, int]] = {}
        """By key, the number of the current period, and the events in it and in the one before."""
        self._sweep_at = MIN_SWEEP_KEYS

    def __len__(self) -> int:
        return len(self.moments) + len(self.counters)

    def sweep(self) -> None:
        """Forget expired keys, each time that the number of keys has doubled."""
        if len(self) < self._sweep_at:
            return
        now = self.clock()
        for key, moments in list(self.moments.items()):
            if moments[-1] <= now - key[1]:
                del self.moments[key]
        for key, (period, _current, _previous) in list(self.counters.items()):
            if now // key[1] > period + 1:
                del self.counters[key]
        self._sweep_at = max(MIN_SWEEP_KEYS, 2 * len(self))


class Rate:
    """Counts the events of keys in this process's memory. For one event loop.

    Args:
        rate: A number and a period, for example ``60/minute``.
        clock: Monotonic, in seconds.
        events: Where the events are counted; several rates may share one, which keeps them apart.
    """

    def __init__(
        self, rate: str, clock: Callable[[], float] = time.monotonic, events: Events | None = None
    ) -> None:
        limit = parse_limit(rate)
        self.amount = limit.amount
        """The number of events allowed in a period."""
        self.period_s = limit.get_expiry()
        """The length of the period."""
        self.exact = self.amount <= MAX_EXACT_EVENTS
        """Whether each event is counted by its moment, and not by two counters."""
        self._events = events or Events(clock)

    async def hit(self, key: str) -> bool:
        """Count an event if it is allowed; whether it is."""
        return self.count(key)[0]

    async def test(self, key: str) -> bool:
        """Whether another event is allowed; counts nothing."""
        return self.count(key, takes=False)[0]

    async def window(self, key: str) -> Window:
        """The state of a key."""
        return self.count(key, takes=False)[1]

    def count(self, key: str, *, takes: bool = True) -> tuple[bool, Window]:
        """Whether an event is allowed, and the state of the key afterwards.

        Args:
            key: Whose event it is.
            takes: Whether the event is counted, if it is allowed.
        """
        if self.exact:
            return self._moving((self.amount, self.period_s, key), takes=takes)
        return self._weighted((self.amount, self.period_s, key), takes=takes)

    def _moving(self, key: _Key, *, takes: bool) -> tuple[bool, Window]:
        """Count in a window that moves with the time."""
        amount, period_s, _ = key
        now = self._events.clock()
        moments = self._events.moments.get(key) or deque[float]()
        while moments and moments[0] <= now - period_s:
            moments.popleft()
        allowed = len(moments) < amount
        if allowed and takes:
            moments.append(now)
            self._events.moments[key] = moments
            self._events.sweep()
        reset_s = moments[0] + period_s - now if moments else float(period_s)
        return allowed, Window(amount - len(moments), reset_s)

    def _weighted(self, key: _Key, *, takes: bool) -> tuple[bool, Window]:
        """Count in this period, and the part of the one before that a moving window would hold."""
        amount, period_s, _ = key
        now = self._events.clock()
        period, passed_s = divmod(now, period_s)
        number, left_s = int(period), period_s - passed_s
        counted, current, previous = self._events.counters.get(key, (number, 0, 0))
        if counted != number:
            current, previous = 0, current if counted == number - 1 else 0
        allowed = previous * left_s / period_s + current < amount
        if allowed and takes:
            current += 1
            self._events.counters[key] = number, current, previous
            self._events.sweep()
        remaining = max(0, amount - int(previous * left_s / period_s + current))
        # As ``limits`` has it: when this period's events begin to leave, or one of the period before does.
        reset_s = left_s % period_s if current else float(period_s if previous else 0)
        if previous:
            reset_s = min(reset_s, left_s % (period_s / previous))
        return allowed, Window(remaining, reset_s)
