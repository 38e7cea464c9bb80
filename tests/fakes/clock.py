"""A clock that moves only when a test says so."""

import asyncio


class FakeClock:
    """A monotonic clock under a test's control; call it for the time in seconds."""

    def __init__(self, now: float = 0.0) -> None:
        self._now = now
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        """Move the clock on; a monotonic clock refuses to go back."""
        if seconds < 0:
            raise ValueError(f"a monotonic clock cannot move by {seconds} s")
        self._now += seconds

    async def sleep(self, seconds: float) -> None:
        """Record the wish, move the clock on at once and let the other tasks run for one turn."""
        self.slept.append(seconds)
        self.advance(max(seconds, 0.0))
        await asyncio.sleep(0)
