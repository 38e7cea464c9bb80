"""Keeps a process from meeting a dying upstream with four times the load."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

SLICES = 10


@dataclass(slots=True)
class _Slice:
    number: int
    calls: int = 0
    retries: int = 0


class RetryBudget:
    """A bucket that calls fill and retries empty, over a sliding window.

    Within the window there are at most ``max(floor, ratio * calls)`` retries: the ratio bounds what a busy
    process adds to an upstream's load, the floor lets a quiet one retry at all (the scheme of Finagle's
    ``RetryBudget``). Counts are kept in ten slices of the window, so memory is bounded.

    Args:
        ratio: Retries for each call.
        floor: Retries that are always allowed within a window.
        window_s: Length of the window, in seconds.
        clock: Monotonic, in seconds.
    """

    def __init__(
        self, ratio: float, floor: int, window_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._ratio = ratio
        self._floor = floor
        self._slice_s = window_s / SLICES
        self._clock = clock
        self._slices: deque[_Slice] = deque(maxlen=SLICES)

    def count_call(self) -> None:
        """Count one call, which may be retried later."""
        self._current().calls += 1

    def take(self) -> bool:
        """Take one retry; False, and nothing taken, when there is none left."""
        current = self._current()
        calls = sum(entry.calls for entry in self._slices)
        retries = sum(entry.retries for entry in self._slices)
        if retries + 1 > max(self._floor, self._ratio * calls):
            return False
        current.retries += 1
        return True

    def give_back(self) -> None:
        """Give back a retry that was taken and not made after all."""
        current = self._current()
        current.retries = max(0, current.retries - 1)

    def _current(self) -> _Slice:
        number = int(self._clock() / self._slice_s)
        while self._slices and self._slices[0].number <= number - SLICES:
            self._slices.popleft()
        if not self._slices or self._slices[-1].number != number:
            self._slices.append(_Slice(number))
        return self._slices[-1]
