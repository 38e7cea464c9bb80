"""Request coalescing: equal calls made at the same time share one call to the upstream.

The first caller leads: its work runs in a task of its own, in the trace of that caller. Callers who ask the
same meanwhile follow. Each caller waits until their own deadline and may leave earlier; the work is cancelled
when nobody waits any more. One caller is billed: the leader, or the first follower to get the answer if the
leader has left.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from opentelemetry import trace
from opentelemetry.trace import SpanContext

from service.errors import UpstreamTimeoutError
from service.upstream.errors import timed_out
from service.upstream.messages import Reply
from service.utils.deadline import Deadline
from service.utils.retry import Progress

Spawn = Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]
Work = Callable[[], Awaitable[tuple[Reply, bool]]]
"""Gives the answer to a call, and whether it is billed here: not where another process made the call."""

CANCEL_TIMEOUT_S = 0.2
"""How long the last caller who leaves waits for the cancelled work to end."""


@dataclass(slots=True)
class _SharedCall:
    """One call to the upstream and the callers who wait for its answer.

    Args:
        answer: Its answer.
        origin: The leader's span, linked from the followers' spans.
        deadline: The leader's deadline.
        progress: The attempts of the leader's work.
        task: Runs the leader's work.
        waiting: How many callers wait.
        leader_left: Whether the leader was cancelled before the answer was there.
        billed: Whether a caller was billed for the answer, here or at another process.
    """

    answer: asyncio.Future[Reply]
    origin: SpanContext
    deadline: Deadline
    progress: Progress
    task: asyncio.Task[None] | None = None
    waiting: int = 0
    leader_left: bool = False
    billed: bool = False


class Coalescing:
    """The calls under way that other callers may join.

    Args:
        spawn: Starts a task in a task group.
    """

    def __init__(self, spawn: Spawn) -> None:
        self._spawn = spawn
        self._calls: dict[str, _SharedCall] = {}

    def in_flight(self, digest: str) -> bool:
        """Whether a call with this digest is under way."""
        return digest in self._calls

    async def share(
        self, digest: str, deadline: Deadline, progress: Progress, work: Work
    ) -> tuple[Reply, bool]:
        """Join the call with this digest, or make it when none is under way.

        Args:
            digest: Identifies equal calls.
            deadline: How long a follower waits; a leader's work has its own limit.
            progress: The attempts of the leader's work. Copied to a follower who is billed.
            work: Makes the call; runs at most once, in the leader's context.

        Returns:
            The answer, and whether this caller is billed for it.

        Raises:
            UpstreamTimeoutError: The leader's work took longer than this follower can wait.
            ServiceError: Whatever the work raised.
        """
        span = trace.get_current_span()
        while (call := self._calls.get(digest)) is not None:
            span.add_link(call.origin)
            try:
                reply, billed = await self._follow(digest, call, deadline)
            except UpstreamTimeoutError:
                # The leader had less time than this follower, who tries again with the time that is left.
                if call.deadline.left_s > 0 or deadline.left_s <= 0:
                    raise
            else:
                if billed:
                    progress.attempts = call.progress.attempts
                    progress.tried, progress.waits_s = call.progress.tried, call.progress.waits_s
                return reply, billed
        answer = asyncio.get_running_loop().create_future()
        call = self._calls[digest] = _SharedCall(answer, span.get_span_context(), deadline, progress)
        call.task = self._spawn(self._lead(digest, call, work))
        try:
            reply = await self._wait(digest, call)
        except asyncio.CancelledError:
            call.leader_left = True
            raise
        billed, call.billed = not call.billed, True
        return reply, billed

    async def _follow(self, digest: str, call: _SharedCall, deadline: Deadline) -> tuple[Reply, bool]:
        try:
            async with asyncio.timeout(deadline.left_s) as limit:
                reply = await self._wait(digest, call)
        except TimeoutError:
            if not limit.expired():
                raise
            raise timed_out(deadline.limit_s) from None
        billed = call.leader_left and not call.billed
        call.billed = call.billed or billed
        return reply, billed

    async def _wait(self, digest: str, call: _SharedCall) -> Reply:
        call.waiting += 1
        try:
            return await asyncio.shield(call.answer)
        finally:
            call.waiting -= 1
            if call.waiting == 0 and not call.answer.done() and call.task is not None:
                # Removed first, so that nobody joins a call that is being cancelled.
                self._remove(digest, call)
                call.task.cancel()
                # The attempt's span has to end before the spans above it do.
                await asyncio.wait({call.task}, timeout=CANCEL_TIMEOUT_S)

    async def _lead(self, digest: str, call: _SharedCall, work: Work) -> None:
        """Run the leader's work, and hand its answer or error to all who wait."""
        try:
            reply, billed_here = await work()
        except asyncio.CancelledError:
            call.answer.cancel()
            raise
        except BaseException as error:
            call.answer.set_exception(error)
            # Marks the exception as retrieved: asyncio would report it when nobody waits any more.
            call.answer.exception()
            if not isinstance(error, Exception):
                raise
        else:
            call.billed = not billed_here
            call.answer.set_result(reply)
        finally:
            self._remove(digest, call)

    def _remove(self, digest: str, call: _SharedCall) -> None:
        if self._calls.get(digest) is call:
            del self._calls[digest]


class NoCoalescing:
    """Every caller makes and pays for their own call; used where the cache is off."""

    def in_flight(self, digest: str) -> bool:  # noqa: ARG002 - as Coalescing has it
        """Whether a call with this digest is under way: none can be joined."""
        return False

    async def share(
        self,
        digest: str,  # noqa: ARG002 - as Coalescing has it
        deadline: Deadline,  # noqa: ARG002 - as Coalescing has it
        progress: Progress,  # noqa: ARG002 - as Coalescing has it
        work: Work,
    ) -> tuple[Reply, bool]:
        """Make the call; the caller is billed for it."""
        return await work()
