"""Puts the drain between a stop signal and the server's own handling of it."""

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import Context
from types import FrameType
from typing import Any

from service.services.drain import Drain

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
