"""Stops work that nobody waits for any more."""

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeVar

from service.errors import CallerLeftError

T = TypeVar("T")
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


async def cancel_on_disconnect(receive: Receive, work: Awaitable[T]) -> T:
    """Await the work; when the caller closes the connection first, cancel it.

    Args:
        receive: The ASGI callable, with the request's body read already.
        work: What the caller waits for. It runs in this task, so spans and context stay as they are.

    Raises:
        CallerLeftError: The caller left, and the work was cancelled.
    """
    try:
        # A time limit without a limit is the standard library's way to cancel the current task and to know
        # afterwards that it was us: the watcher pulls the limit to now.
        async with asyncio.timeout(None) as scope:
            watcher = asyncio.create_task(_expire_on_disconnect(receive, scope))
            try:
                return await work
            finally:
                watcher.cancel()
    except TimeoutError:
        if scope.expired():
            raise CallerLeftError from None
        raise


async def _expire_on_disconnect(receive: Receive, scope: asyncio.Timeout) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.reschedule(asyncio.get_running_loop().time())
