"""Leases on model calls: of equal calls that several processes have at the same time, one asks the model.

The process that takes the lease on a call makes it, and leaves the answer for the others for some seconds. A
lease ends soon after its owner, who renews it until the deadline of its call, so another process takes over
from one that was killed. A process that gets no answer from the server makes the call itself.
"""

import asyncio
import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Final, Literal, Protocol

from opentelemetry.metrics import Counter
from opentelemetry.trace import SpanContext

from service.shared.exchange import Exchange, Request, ServerFailedError, Waited
from service.utils.deadline import Deadline

LEASE_S: Final = 2.0
"""How long a lease outlives an owner that was killed."""

RENEW_S: Final = 0.5
"""Time between two renewals: three may fail."""

ANSWER_S: Final = 5.0
"""How long an answer is left for those who wait, and for those who ask before it is in the cache's store."""

MAX_ANSWER_BYTES: Final = 262_144
"""Largest answer that is left: it travels with the counts of other calls, which have milliseconds."""

POLLS_S: Final = (0.025, 0.05, 0.1, 0.2)
"""Seconds between the questions of one who waits; the last one stands for all that follow."""

FOUND: Final = re.compile(rb"(?:held|made) [0-9a-f]{16} ([0-9a-f]{32})-([0-9a-f]{16})(?: (.+))?", re.DOTALL)
"""A lease or an answer: its owner, the owner's span, and the answer."""

Outcome = Literal["leader", "taken_over", "follower", "none"]
"""What a lease came to: the call is made here, at once or after another process had the lease; it was made by
another process; the server could not say."""


class LeaseTimeoutError(Exception):
    """The answer of another process did not come before the deadline."""


@dataclass(frozen=True, slots=True)
class Take(Request[bytes]):
    """Asks for the lease; the answer is what is there instead of it, or nothing.

    Args:
        call: The digest of the call.
        own: The value of the lease.
        kept_s: Seconds until it ends.
    """

    call: str
    own: bytes
    kept_s: float

    @property
    def operation(self) -> Literal["lease"]:
        """Its name on the metrics."""
        return "lease"


@dataclass(frozen=True, slots=True)
class Put(Request[bytes]):
    """Puts something in the place of the own lease: the same for a renewal, or nothing to end it.

    Args:
        call: The digest of the call.
        own: The value of the lease.
        value: What is put.
        kept_s: Seconds until it ends.
    """

    call: str
    own: bytes
    value: bytes
    kept_s: float

    @property
    def operation(self) -> Literal["lease"]:
        """Its name on the metrics."""
        return "lease"


@dataclass(slots=True)
class Lease:
    """What a process learned about a call that it wants to make.

    Args:
        answer: The answer that another process has made; None where the call is to be made here.
        origin: The span of the process that has made it.
        followed: Whether it was made while this process waited for it.
        made: To be set where the call was made here: gives the answer, for the others.
    """

    answer: bytes | None = None
    origin: SpanContext | None = None
    followed: bool = False
    made: Callable[[], bytes] | None = None


class Leases(Protocol):
    """Leases on calls."""

    def lease(self, call: str, deadline: Deadline, origin: SpanContext) -> AbstractAsyncContextManager[Lease]:
        """Take the lease on a call, or wait for the answer of the process that has it.

        Args:
            call: The digest of the call, the same for all that are equal.
            deadline: When the call must be over.
            origin: The caller's span.

        Raises:
            LeaseTimeoutError: The answer did not come before the deadline.
        """
        ...

    async def run(self) -> None:
        """Renew the leases until cancelled."""
        ...


class NoLeases:
    """Stands for leases where processes share no server: each makes all of its calls."""

    @asynccontextmanager
    async def lease(
        self,
        call: str,  # noqa: ARG002 - as Leases has it
        deadline: Deadline,  # noqa: ARG002 - as Leases has it
        origin: SpanContext,  # noqa: ARG002 - as Leases has it
    ) -> AsyncIterator[Lease]:
        """There is nobody else who could have made the call."""
        yield Lease()

    async def run(self) -> None:
        """There is nothing to renew."""


class SharedLeases:
    """Leases in the server that processes share.

    Args:
        exchange: Asks the server.
        counter: Counts the calls, by what the lease came to.
        sleep: Waits for so many seconds.
    """

    def __init__(
        self,
        exchange: Exchange,
        counter: Counter,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        self._exchange = exchange
        self._counter = counter
        self._sleep = sleep
        self._held: dict[bytes, tuple[str, Deadline]] = {}

    @asynccontextmanager
    async def lease(self, call: str, deadline: Deadline, origin: SpanContext) -> AsyncIterator[Lease]:
        """Take the lease on a call, or wait for the answer of the process that has it."""
        owner = b" %016x %032x-%016x" % (secrets.randbits(64), origin.trace_id, origin.span_id)
        own, lease = b"held" + owner, Lease()
        try:
            lease, outcome = await self._taken(call, own, deadline)
            self._counter.add(1, {"outcome": outcome})
            if lease.answer is None:
                self._held[own] = call, deadline
            yield lease
        finally:
            self._held.pop(own, None)
            if lease.answer is None:
                # Whoever left while the server was asked may have the lease, too.
                answer = lease.made() if lease.made is not None else b""
                fits = 0 < len(answer) <= MAX_ANSWER_BYTES
                self._exchange.tell(Put(call, own, b"made%b %b" % (owner, answer) if fits else b"", ANSWER_S))

    async def _taken(self, call: str, own: bytes, deadline: Deadline) -> tuple[Lease, Outcome]:
        """Ask until the lease or an answer is there, or the server fails."""
        waits = 0
        while (left_s := deadline.left_s) > 0:
            try:
                found = await self._exchange.ask(Take(call, own, min(LEASE_S, left_s)), Waited())
            except ServerFailedError:
                return Lease(), "none"
            if not found:
                return Lease(), "taken_over" if waits else "leader"
            parts = FOUND.fullmatch(found)
            if parts is None:
                # Whatever it is, it is neither a lease nor an answer.
                return Lease(), "none"
            trace_id, span_id, answer = parts.groups()
            if answer is not None:
                span = SpanContext(int(trace_id, 16), int(span_id, 16), is_remote=True)
                return Lease(answer, span, followed=waits > 0), "follower"
            await self._sleep(min(POLLS_S[min(waits, len(POLLS_S) - 1)], left_s))
            waits += 1
        raise LeaseTimeoutError

    async def run(self) -> None:
        """Renew the leases until cancelled."""
        while True:
            await self._sleep(RENEW_S)
            for own, (call, deadline) in self._held.items():
                if (left_s := deadline.left_s) > 0:
                    self._exchange.tell(Put(call, own, own, min(LEASE_S, left_s)))
