"""Equal calls at the same time share one call to the upstream, and each goes its own way in all else.

The work is a task of its own, in the trace of the call that was first. Each caller waits within their own
deadline and may leave; the work is stopped when all have left. Who pays is settled when the answer is there:
the first, and where that one has left, whoever of the others is next.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from opentelemetry import trace
from opentelemetry.trace import SpanContext

from service.errors import UpstreamTimeoutError
from service.upstream.errors import timed_out
from service.upstream.messages import Reply
from service.utils.deadline import Deadline
from service.utils.retry import Progress

Spawn = Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]
Work = Callable[[], Awaitable[Reply]]

STOP_LIMIT_S = 0.2
"""So long the last one who leaves waits for the work to stop."""


class _Flight:
    """One call to the upstream, and those who wait for it."""

    def __init__(self, origin: SpanContext, deadline: Deadline, progress: Progress) -> None:
        self.origin = origin
        self.deadline = deadline
        self.progress = progress
        self.answer: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self.task: asyncio.Task[None] | None = None
        self.waiting = 0
        self.first_is_here = True
        self.paid = False


class Flights:
    """The calls that are under way and may be shared.

    Args:
        spawn: Starts a task that somebody owns.
    """

    def __init__(self, spawn: Spawn) -> None:
        self._spawn = spawn
        self._flights: dict[str, _Flight] = {}

    def __contains__(self, digest: object) -> bool:
        return digest in self._flights

    async def share(
        self, digest: str, deadline: Deadline, progress: Progress, work: Work
    ) -> tuple[Reply, bool]:
        """The answer of the call with this digest, which is made unless it is under way.

        Args:
            digest: Equal calls have the same.
            deadline: How long this caller waits for the work of another; their own work has its own limit.
            progress: How far the work has come, where it is this caller's; who pays gets it too.
            work: Makes the call; runs at most once, in this caller's context.

        Returns:
            The answer, and whether it is this caller's to pay.

        Raises:
            UpstreamTimeoutError: The other's work took longer than this caller can wait.
            ServiceError: What the work raised.
        """
        while True:
            flight = self._flights.get(digest)
            if flight is None:
                return await self._lead(digest, _Flight(_here(), deadline, progress), work)
            trace.get_current_span().add_link(flight.origin)
            try:
                reply, pays = await self._follow(digest, flight, deadline)
            except UpstreamTimeoutError:
                # The first had less time than this one: it is not over for those who have some left.
                if flight.deadline.left_s > 0 or deadline.left_s <= 0:
                    raise
            else:
                if pays:
                    progress.attempts = flight.progress.attempts
                return reply, pays

    async def _lead(self, digest: str, flight: _Flight, work: Work) -> tuple[Reply, bool]:
        self._flights[digest] = flight
        flight.task = self._spawn(self._fly(digest, flight, work))
        try:
            reply = await self._wait(digest, flight)
        except asyncio.CancelledError:
            flight.first_is_here = False
            raise
        flight.paid = True
        return reply, True

    async def _follow(self, digest: str, flight: _Flight, deadline: Deadline) -> tuple[Reply, bool]:
        try:
            async with asyncio.timeout(deadline.left_s) as limit:
                reply = await self._wait(digest, flight)
        except TimeoutError:
            if not limit.expired():
                raise
            raise timed_out(deadline.limit_s) from None
        pays = not flight.first_is_here and not flight.paid
        flight.paid = flight.paid or pays
        return reply, pays

    async def _wait(self, digest: str, flight: _Flight) -> Reply:
        flight.waiting += 1
        try:
            return await asyncio.shield(flight.answer)
        finally:
            flight.waiting -= 1
            if flight.waiting == 0 and not flight.answer.done() and flight.task is not None:
                # Nobody new joins what is about to be stopped.
                self._forget(digest, flight)
                flight.task.cancel()
                # Its span belongs before the end of those above it.
                await asyncio.wait({flight.task}, timeout=STOP_LIMIT_S)

    async def _fly(self, digest: str, flight: _Flight, work: Work) -> None:
        try:
            reply = await work()
        except asyncio.CancelledError:
            flight.answer.cancel()
            raise
        except BaseException as error:
            flight.answer.set_exception(error)
            # Whoever waits gets it; when nobody does any more it is nobody's.
            flight.answer.exception()
            if not isinstance(error, Exception):
                raise
        else:
            flight.answer.set_result(reply)
        finally:
            self._forget(digest, flight)

    def _forget(self, digest: str, flight: _Flight) -> None:
        if self._flights.get(digest) is flight:
            del self._flights[digest]


def _here() -> SpanContext:
    return trace.get_current_span().get_span_context()
