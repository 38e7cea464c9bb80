"""Puts the drain between a stop signal and the server's own handling of it."""

import asyncio
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import Context
from types import FrameType
from typing import Any

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


STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def drain_on_signal(drain: Drain, tasks: asyncio.TaskGroup) -> Iterator[None]:
    """Drain on the first stop signal, then hand it to the server; a second signal ends it at once.

    uvicorn stops listening as soon as it gets the signal: nobody could see that the process is not ready any
    more, and a caller who comes late would meet a closed port instead of an answer. Its handlers are in place
    when the lifespan starts, in every worker process, so they are taken over here and called when the drain
    is over. Where there are none to take over (a server in a thread), the server stops as it always does.

    A signal that came while the app was imported is uvicorn's already; it is drained for all the same, so
    that every stop reads alike. Either way uvicorn ends the start first, and stops then.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    stop = _Stop(drain, tasks, {number: signal.getsignal(number) for number in STOP_SIGNALS})
    for number in STOP_SIGNALS:
        signal.signal(number, stop.on_signal)
    stop.begin_if_signalled()
    try:
        yield
    finally:
        for number, handler in stop.servers.items():
            signal.signal(number, handler)


class _Stop:
    """Knows whether a signal has come, and whose it would have been."""

    def __init__(
        self,
        drain: Drain,
        tasks: asyncio.TaskGroup,
        servers: dict[signal.Signals, Callable[[int, FrameType | None], Any] | int | None],
    ) -> None:
        self.servers = servers
        self._drain = drain
        self._tasks = tasks
        self._loop = asyncio.get_running_loop()
        self._signalled = False

    def begin_if_signalled(self) -> None:
        """Drain at once where the server has the signal already."""
        if any(getattr(_server_of(handler), "should_exit", False) for handler in self.servers.values()):
            self._signalled = True
            self._drain.begin()
            self._tasks.create_task(self._drain.wait(), name="drain")

    def on_signal(self, number: int, _frame: FrameType | None) -> None:
        """Only note and hand on: this runs between any two bytecodes, perhaps in the middle of a log line."""
        if self._signalled:
            # uvicorn forces its exit on a second SIGINT only; a second SIGTERM means the same here.
            server = _server_of(self.servers[signal.Signals(number)])
            if server is not None:
                server.force_exit = True
            self._hand_over(number)
            return
        self._signalled = True
        # In a context of its own: the signal may have come in the middle of somebody's request.
        self._loop.call_soon_threadsafe(self._start, number, context=Context())

    def _start(self, number: int) -> None:
        self._drain.begin()
        self._tasks.create_task(self._drain_then_hand_over(number), name="drain")

    async def _drain_then_hand_over(self, number: int) -> None:
        await self._drain.wait()
        self._hand_over(number)

    def _hand_over(self, number: int) -> None:
        handler = self.servers[signal.Signals(number)]
        if callable(handler):
            handler(number, None)


def _server_of(handler: object) -> Any:  # noqa: ANN401 - uvicorn.Server, or what stands in its place
    """The server whose method the handler is; None where there is none."""
    return getattr(handler, "__self__", None)
