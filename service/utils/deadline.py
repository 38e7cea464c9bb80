"""The deadline of a call, passed as a value to everything that spends time on the call.

A module of its own, because routers, cache, retry and transport all import it and nothing else from each
other.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True)
class Deadline:
    """A time on a monotonic clock, in seconds.

    Args:
        at: The time.
        limit_s: The whole time limit, for messages.
        clock: The clock that ``at`` refers to.
    """

    at: float
    limit_s: float
    clock: Callable[[], float] = time.monotonic

    @classmethod
    def after(
        cls, limit_s: float, *, since: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> Self:
        """Return the deadline ``limit_s`` seconds after ``since``, by default after the present."""
        return cls((clock() if since is None else since) + limit_s, limit_s, clock)

    @property
    def left_s(self) -> float:
        """Seconds until the deadline; 0 after it."""
        return max(0.0, self.at - self.clock())
