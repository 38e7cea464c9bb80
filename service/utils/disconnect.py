"""Cancels work when its caller disconnects.

A module of its own, because it is the only code that reads ASGI messages below the routers.
"""

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final, TypeVar

from starlette.types import Scope

from service.errors import CallerLeftError

T = TypeVar("T")
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


ABORT: Final = "llmops.abort"
"""Key in the scope under which the server's protocol leaves the function that ends the connection at once."""


def abort_connection(scope: Scope) -> None:
    """End the request's connection without waiting until what was written has been read."""
    abort: Callable[[], None] | None = scope.get(ABORT)
    if abort is not None:
        abort()


CUT: Final = "llmops.cut"
"""Key in the scope of the function that ends the connection, and with it an answer that is not complete."""


def cut_connection(scope: Scope) -> None:
    """End the request's connection after what was written, so that the answer is seen to be incomplete."""
    cut: Callable[[], None] | None = scope.get(CUT)
    if cut is not None:
        cut()


async def cancel_on_disconnect(receive: Receive, work: Awaitable[T]) -> T:
    """Await the work, and cancel it when the caller closes the connection first.

    The work runs in the current task, so that spans and context variables stay as they are. The task that
    watches for the disconnect is created only when the work suspends.

    Args:
        receive: The ASGI callable, after the request's body has been read.
        work: The work that the caller waits for.

    Raises:
        CallerLeftError: The caller closed the connection, and the work was cancelled.
    """
    loop = asyncio.get_running_loop()
    watchers: list[asyncio.Task[None]] = []
    try:
        # A time limit without a deadline cancels the current task when the watcher reschedules it to the
        # present, and turns exactly that cancellation into a TimeoutError.
        async with asyncio.timeout(None) as limit:
            start = loop.call_soon(
                lambda: watchers.append(loop.create_task(_expire_on_disconnect(receive, limit)))
            )
            try:
                return await work
            finally:
                start.cancel()
                for watcher in watchers:
                    watcher.cancel()
    except TimeoutError:
        if limit.expired():
            raise CallerLeftError from None
        raise


async def _expire_on_disconnect(receive: Receive, limit: asyncio.Timeout) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    limit.reschedule(asyncio.get_running_loop().time())
