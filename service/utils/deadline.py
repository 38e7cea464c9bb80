"""One moment by which a call is over, carried as a value through everything that spends time on it."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True)
class Deadline:
    """A moment on a monotonic clock, in seconds.

    Args:
        at: The moment.
        limit_s: The whole time that there was; for messages.
        clock: The clock that ``at`` is read from.
    """

    at: float
    limit_s: float
    clock: Callable[[], float] = time.monotonic

    @classmethod
    def after(
        cls, limit_s: float, *, since: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> Self:
        """The deadline so many seconds after a moment on the clock; after now without one."""
        return cls((clock() if since is None else since) + limit_s, limit_s, clock)

    @property
    def left_s(self) -> float:
        """Seconds until then; 0 when it has passed."""
        return max(0.0, self.at - self.clock())
