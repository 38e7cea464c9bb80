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
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    stop = _Stop(drain, tasks, {number: signal.getsignal(number) for number in STOP_SIGNALS})
    for number in STOP_SIGNALS:
        signal.signal(number, stop.on_signal)
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

    def on_signal(self, number: int, _frame: FrameType | None) -> None:
        """Only note and hand on: this runs between any two bytecodes, perhaps in the middle of a log line."""
        if self._signalled:
            # uvicorn forces its exit on a second SIGINT only; a second SIGTERM means the same here.
            server = getattr(self.servers[signal.Signals(number)], "__self__", None)
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
