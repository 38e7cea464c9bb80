"""Counts calls against limits: in this process's memory, or in a Valkey server that several processes share.

``SharedCounts`` asks the server in batches, over one connection: calls that arrive while an exchange is under
way share the next one. A connection for each would have to be opened in a burst of calls, within a time limit
of milliseconds, and a batch takes a third of the processor's time that its calls would take one by one.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Final, Literal, Protocol

from service.config.settings import Settings
from service.errors import ServiceError, UpstreamError
from service.telemetry import names
from service.telemetry.events import emit
from service.telemetry.instruments import Instruments
from service.utils.rates import Rate, Window

DEPENDENCY: Final = "valkey"
"""The server's name as a dependency, and its breaker's."""

BREAKER_FAILURES: Final = 3
BREAKER_S: Final = 10.0

MAX_BATCH: Final = 256
MAX_WAITING: Final = 10_000
"""Calls that may wait for the server; further ones are counted in this process."""

SLOW: Final = "slow"
CIRCUIT_OPEN: Final = "circuit_open"
STOPPED: Final = "stopped"

How = Literal["together", "alone", "look"]
"""How a limit counts a call: only if all limits that count it together have room, if it has room itself, or
not at all."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Limit:
    """A limit that applies to a call.

    Args:
        rate: What is allowed; it also holds this process's own count.
        key: Whose events these are.
        how: How the call is counted.
    """

    rate: Rate
    key: str
    how: How = "together"


@dataclass(frozen=True, slots=True)
class Counted:
    """What came of a count.

    Args:
        allowed: Whether all limits that count the call together had room.
        windows: The state of each limit after the count, in the order of the limits.
    """

    allowed: bool
    windows: Sequence[Window]


@dataclass(slots=True)
class Waited:
    """How long one request has waited for the server, so that its counts share the time limit."""

    seconds: float = 0.0


class SharedCountsError(Exception):
    """The server did not count; ``reason`` is one of a few words, fit for an event's attribute."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class Counts(Protocol):
    """Counts calls against limits."""

    @property
    def pings(self) -> Mapping[str, Callable[[], Awaitable[None]]]:
        """The check of the server, by the dependency's name; none without a server."""
        ...

    async def count(self, limits: Sequence[Limit], waited: Waited | None = None) -> Counted:
        """Count one call against all limits, at the same moment; it always ends well.

        Args:
            limits: Those that apply.
            waited: What the request has waited before; what this count waits is added.
        """
        ...

    async def run(self) -> None:
        """Do the work in the background, until cancelled."""
        ...


class LocalCounts:
    """Counts in this process's memory."""

    pings: Mapping[str, Callable[[], Awaitable[None]]] = {}

    async def count(self, limits: Sequence[Limit], waited: Waited | None = None) -> Counted:
        """Count one call against all limits."""
        del waited
        together = [limit for limit in limits if limit.how == "together"]
        if len(together) == 1:
            allowed = await together[0].rate.hit(together[0].key)
        else:
            allowed = all([await limit.rate.test(limit.key) for limit in together])
            for limit in together if allowed else ():
                await limit.rate.hit(limit.key)
        for limit in limits:
            if limit.how == "alone":
                await limit.rate.hit(limit.key)
        return Counted(allowed, [await limit.rate.window(limit.key) for limit in limits])

    async def run(self) -> None:
        """Nothing is done in the background."""


class Server(Protocol):
    """A server that counts, and may be down."""

    async def exchange(self, calls: Sequence[Sequence[Limit]]) -> Sequence[Counted]:
        """Count several calls in one round trip; raises whatever its client raises."""
        ...

    def reason_of(self, error: Exception) -> str:
        """Name in a word what ``exchange`` raised."""
        ...

    async def ping(self) -> None:
        """Check that the server counts; raises ``UpstreamError`` when it does not."""
        ...


class Breaker(Protocol):
    """A circuit breaker, as the counts use it."""

    @property
    def state(self) -> str:
        """Its state; ``closed`` while the server works."""
        ...

    @property
    def rejects(self) -> bool:
        """Whether an attempt would be rejected now."""
        ...

    def attempt(self) -> AbstractContextManager[None]:
        """Let one attempt pass, and learn from how it ends."""
        ...


_Entry = tuple[Sequence[Limit], asyncio.Future[Counted]]
"""A call that waits for the server, and who waits for it."""


@asynccontextmanager
async def open_counts(
    settings: Settings,
    instruments: Instruments,
    breaker: Callable[[str], Breaker],
    on_change: Callable[[], None] = lambda: None,
) -> AsyncIterator[Counts]:
    """Open the counts of this process, or those at ``VALKEY_URL``; nothing is sent until they are used.

    Args:
        settings: Where the server is, and its time limit.
        instruments: Measure the counts.
        breaker: Makes a circuit breaker of this name; with ``BREAKER_FAILURES`` and ``BREAKER_S``.
        on_change: Called when the server begins to fail, and when it works again.
    """
    url = settings.valkey_url.get_secret_value()
    if not url:
        yield LocalCounts()
        return
    # Its client library takes a fifth of a second to import.
    from service.shared.valkey import open_valkey  # noqa: PLC0415

    async with open_valkey(url) as server:
        yield SharedCounts(
            server, breaker(DEPENDENCY), instruments, settings.valkey_timeout_s, on_change=on_change
        )


class SharedCounts:
    """Counts in the server, and in this process's memory while the server cannot be had.

    A call that the server allowed is counted in memory too, so that nobody begins with a whole window when
    the server fails.

    Args:
        server: Counts for all processes.
        breaker: Keeps the time limit from being waited for again and again.
        instruments: Measure the counts, and observe whether the server can be had.
        timeout_s: How long a request waits for the server.
        on_change: Called when the server begins to fail, and when it works again.
    """

    def __init__(
        self,
        server: Server,
        breaker: Breaker,
        instruments: Instruments,
        timeout_s: float,
        *,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self.pings: Mapping[str, Callable[[], Awaitable[None]]] = {DEPENDENCY: server.ping}
        self._server = server
        self._breaker = breaker
        self._duration = instruments.shared_operation_duration
        self._timeout_s = timeout_s
        self._on_change = on_change
        self._local = LocalCounts()
        self._waiting: list[_Entry] = []
        self._wanted = asyncio.Event()
        self._falls_back = False
        self._reason = ""
        instruments.observe_fallback(lambda: self._breaker.state != "closed")

    async def count(self, limits: Sequence[Limit], waited: Waited | None = None) -> Counted:
        """Count one call against all limits, in the server if it answers in time."""
        waited = waited or Waited()
        if self._breaker.rejects:
            self._note_fallback()
            return await self._local.count(limits)
        started_s = time.perf_counter()
        try:
            counted = await self._asked(limits, self._timeout_s - waited.seconds)
        except SharedCountsError:
            self._measure(limits, "error", started_s)
            if self._breaker.state != "closed":
                self._note_fallback()
            return await self._local.count(limits)
        finally:
            waited.seconds += time.perf_counter() - started_s
        self._measure(limits, "success", started_s)
        self._note_success()
        for limit in limits:
            if limit.how == "alone" or (limit.how == "together" and counted.allowed):
                await limit.rate.hit(limit.key)
        return counted

    async def _asked(self, limits: Sequence[Limit], left_s: float) -> Counted:
        """Let the next exchange count the call; raises ``SharedCountsError``."""
        if left_s <= 0 or len(self._waiting) >= MAX_WAITING:
            raise SharedCountsError(SLOW)
        future: asyncio.Future[Counted] = asyncio.get_running_loop().create_future()
        self._waiting.append((limits, future))
        self._wanted.set()
        try:
            async with asyncio.timeout(left_s):
                return await future
        except TimeoutError:
            raise SharedCountsError(SLOW) from None

    async def run(self) -> None:
        """Exchange batches with the server until cancelled."""
        try:
            while True:
                await self._wanted.wait()
                batch, self._waiting = self._waiting[:MAX_BATCH], self._waiting[MAX_BATCH:]
                if not self._waiting:
                    self._wanted.clear()
                # Whoever has left, or waited too long, is not counted.
                batch = [entry for entry in batch if not entry[1].done()]
                if batch:
                    await self._exchange(batch)
        finally:
            self._fail(self._waiting, STOPPED)

    async def _exchange(self, batch: Sequence[_Entry]) -> None:
        reason = CIRCUIT_OPEN
        try:
            if self._breaker.rejects:
                return
            with self._breaker.attempt():
                try:
                    async with asyncio.timeout(self._timeout_s):
                        counted = await self._server.exchange([limits for limits, _future in batch])
                    for (_limits, future), one in zip(batch, counted, strict=True):
                        if not future.done():
                            future.set_result(one)
                except TimeoutError:
                    reason = SLOW
                except Exception as error:  # noqa: BLE001 - the client raises whatever it meets
                    reason = self._server.reason_of(error)
                else:
                    return
                self._reason = reason
                # The breaker counts this service's errors only.
                raise UpstreamError(label=reason)
        except ServiceError:
            pass
        finally:
            self._fail(batch, reason)

    def _fail(self, batch: Sequence[_Entry], reason: str) -> None:
        for _limits, future in batch:
            if not future.done():
                future.set_exception(SharedCountsError(reason))

    def _measure(self, limits: Sequence[Limit], outcome: str, started_s: float) -> None:
        looks = all(limit.how == "look" for limit in limits)
        self._duration.record(
            time.perf_counter() - started_s, {"operation": "look" if looks else "count", "outcome": outcome}
        )

    def _note_fallback(self) -> None:
        if self._falls_back:
            return
        self._falls_back = True
        emit(
            logger,
            names.EVENT_SHARED_FALLBACK_STARTED,
            f"Valkey fails: {self._reason}. Each process counts by itself",
            {"reason": self._reason},
            level=logging.WARNING,
        )
        self._on_change()

    def _note_success(self) -> None:
        if self._falls_back:
            self._falls_back = False
            emit(
                logger,
                names.EVENT_SHARED_FALLBACK_ENDED,
                "Valkey works again. The processes count together",
                {},
            )
            self._on_change()
