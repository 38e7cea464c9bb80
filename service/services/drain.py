"""Graceful shutdown: ``drain_on_signal`` starts a ``Drain`` on the stop signal, before the server handles it.

uvicorn stops listening as soon as it gets the signal. Load balancers could then not see that the process is
not ready any more, and late requests would meet a closed port instead of an answer. The drain therefore
takes over uvicorn's signal handlers and calls them when it is done.
"""

import asyncio
import inspect
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import Context
from types import FrameType
from typing import Any

import uvicorn

from service.telemetry import names
from service.telemetry.events import emit

CANCEL_GRACE_S = 0.5
"""Time for requests that were cancelled at the limit to answer their callers."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)

SAME_SIGNAL_S = 1.0
"""Time after a stop signal within which another one is the same: a process manager sends it to the process
and to its group, and a shell and its child both pass it on."""

Handler = Callable[[int, FrameType | None], Any] | int | None

logger = logging.getLogger(__name__)


class Drain:
    """Tracks the requests in flight; after the stop signal it lets them finish and refuses new ones.

    Args:
        grace_s: Seconds after the signal during which new requests are still accepted.
        timeout_s: Seconds after the signal when requests in flight are cancelled.
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
        """Whether the stop signal has come, so that this process is not ready any more."""
        return self._started_at is not None

    @property
    def since_signal_s(self) -> float:
        """Seconds since the stop signal; 0 before it."""
        return 0.0 if self._started_at is None else self._clock() - self._started_at

    @property
    def in_flight(self) -> int:
        """Number of requests in flight."""
        return len(self._running)

    def enter(self, limit: asyncio.Timeout) -> bool:
        """Count a request as in flight; False, and not counted, after the grace period.

        Args:
            limit: The time limit around the request, which the drain reschedules to cancel it.
        """
        if self._started_at is not None and self._clock() >= self._started_at + self._grace_s:
            return False
        self._running.add(limit)
        self._idle.clear()
        return True

    def leave(self, limit: asyncio.Timeout) -> None:
        """Stop counting a request, after the last byte of its answer has been sent."""
        self._running.discard(limit)
        if not self._running:
            self._idle.set()
        if self._started_at is not None:
            emit(logger, names.EVENT_SHUTDOWN_STEP, "Request completed", {"in_flight": self.in_flight})

    def begin(self) -> None:
        """Start draining; a second call has no effect."""
        if self._started_at is None:
            self._started_at = self._clock()
            emit(
                logger,
                names.EVENT_SHUTDOWN_STARTED,
                "Received shutdown signal",
                {"in_flight": self.in_flight},
            )

    async def wait(self) -> None:
        """Wait for the grace period and the requests in flight; cancel those that exceed the time limit."""
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
        for limit in list(self._running):
            limit.reschedule(now)
        try:
            async with asyncio.timeout(CANCEL_GRACE_S):
                await self._idle.wait()
        except TimeoutError:
            logger.warning("%d request(s) did not end when they were cancelled", self.in_flight)


@contextmanager
def drain_on_signal(
    drain: Drain, tasks: asyncio.TaskGroup, clock: Callable[[], float] = time.monotonic
) -> Iterator[None]:
    """Drain on the first stop signal, then pass the signal to uvicorn; a later second one stops it at once.

    uvicorn's handlers are in place when the lifespan starts, in every worker process. In a server that runs
    in a thread there are none, and nothing is taken over.

    If a signal came before this function was called, uvicorn has it already and will stop after the start.
    The drain then begins at once, so that every shutdown logs the same lines.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    stop = _Stop(drain, tasks, handlers, clock)
    for number in STOP_SIGNALS:
        signal.signal(number, stop.on_signal)
    stop.begin_if_signalled()
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


class _Stop:
    """The signal handler: starts the drain, and passes the signal to uvicorn's handler afterwards."""

    def __init__(
        self,
        drain: Drain,
        tasks: asyncio.TaskGroup,
        handlers: Mapping[signal.Signals, Handler],
        clock: Callable[[], float],
    ) -> None:
        self._drain = drain
        self._tasks = tasks
        self._handlers = handlers
        self._loop = asyncio.get_running_loop()
        self._clock = clock
        self._signalled_at: float | None = None

    def begin_if_signalled(self) -> None:
        """Drain at once where uvicorn has received a signal already."""
        servers = [_server_of(handler) for handler in self._handlers.values()]
        if any(server is not None and server.should_exit for server in servers):
            self._signalled_at = self._clock()
            self._drain.begin()
            self._tasks.create_task(self._drain.wait(), name="drain")

    def on_signal(self, number: int, _frame: FrameType | None) -> None:
        """Handle a stop signal. Runs between two bytecodes, so it only schedules the work."""
        if self._signalled_at is not None:
            if self._clock() < self._signalled_at + SAME_SIGNAL_S:
                return
            # uvicorn itself forces the exit on a second SIGINT only; here a second SIGTERM does the same.
            server = _server_of(self._handlers[signal.Signals(number)])
            if server is not None:
                server.force_exit = True
            self._pass_on(number)
            return
        self._signalled_at = self._clock()
        # A new context: the signal may have interrupted a request.
        self._loop.call_soon_threadsafe(self._start, number, context=Context())

    def _start(self, number: int) -> None:
        self._drain.begin()
        self._tasks.create_task(self._drain_and_pass_on(number), name="drain")

    async def _drain_and_pass_on(self, number: int) -> None:
        await self._drain.wait()
        self._pass_on(number)

    def _pass_on(self, number: int) -> None:
        handler = self._handlers[signal.Signals(number)]
        if callable(handler):
            handler(number, None)


def _server_of(handler: Handler) -> uvicorn.Server | None:
    """Return the uvicorn server whose method a signal handler is."""
    if inspect.ismethod(handler) and isinstance(handler.__self__, uvicorn.Server):
        return handler.__self__
    return None
