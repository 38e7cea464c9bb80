"""The end of a process's life: who is still being served, and whether anybody new is."""

import asyncio
import logging
import time
from collections.abc import Callable

from service.telemetry import names
from service.telemetry.events import emit

CANCEL_GRACE_S = 0.5
"""So long the requests that were cancelled at the limit get to say so to their callers."""

logger = logging.getLogger(__name__)


class Drain:
    """Counts requests in flight, and after the stop signal lets them end and no more begin.

    Args:
        grace_s: Seconds after the signal in which new requests are still taken.
        timeout_s: Seconds after the signal when what still runs is cancelled.
        clock: Monotonic, in seconds.
    """

    def __init__(self, grace_s: float, timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._grace_s = grace_s
        self._timeout_s = timeout_s
        self._clock = clock
        self._running: set[asyncio.Timeout] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._started_at: float | None = None

    @property
    def draining(self) -> bool:
        """Whether the stop signal has come: this process is not ready any more."""
        return self._started_at is not None

    @property
    def refusing(self) -> bool:
        """Whether new requests are turned away: draining, and the grace is over."""
        return self._started_at is not None and self._clock() >= self._started_at + self._grace_s

    @property
    def since_signal_s(self) -> float:
        """Seconds since the stop signal; 0 before it."""
        return 0.0 if self._started_at is None else self._clock() - self._started_at

    @property
    def in_flight(self) -> int:
        """Requests being served now."""
        return len(self._running)

    def begin(self) -> None:
        """Note the stop signal; the second one changes nothing here."""
        if self._started_at is None:
            self._started_at = self._clock()
            emit(
                logger,
                names.EVENT_SHUTDOWN_STARTED,
                "Received shutdown signal",
                {"in_flight": self.in_flight},
            )

    async def wait(self) -> None:
        """Wait until the grace is over and nobody is being served; at the limit, cancel who still is."""
        limit_s = max(0.0, self._timeout_s - self.since_signal_s)
        try:
            async with asyncio.timeout(limit_s):
                await asyncio.sleep(max(0.0, self._grace_s - self.since_signal_s))
                emit(
                    logger,
                    names.EVENT_SHUTDOWN_WAITING,
                    f"Waiting for {self.in_flight} in-flight request(s)...",
                    {"in_flight": self.in_flight},
                )
                await self._idle.wait()
        except TimeoutError:
            await self._cancel_all()

    async def _cancel_all(self) -> None:
        logger.warning("Cancelling %d request(s): the time limit is over", self.in_flight)
        now = asyncio.get_running_loop().time()
        for scope in list(self._running):
            scope.reschedule(now)
        try:
            async with asyncio.timeout(CANCEL_GRACE_S):
                await self._idle.wait()
        except TimeoutError:
            logger.warning("%d request(s) did not end when they were cancelled", self.in_flight)

    def enter(self, scope: asyncio.Timeout) -> None:
        """Count a request in; the scope is what cancels it."""
        self._running.add(scope)
        self._idle.clear()

    def leave(self, scope: asyncio.Timeout) -> None:
        """Count it out, when its last byte is sent."""
        self._running.discard(scope)
        if not self._running:
            self._idle.set()
        if self.draining:
            emit(logger, names.EVENT_SHUTDOWN_STEP, "Request completed", {"in_flight": self.in_flight})
