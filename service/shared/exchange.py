"""Asks the Valkey server in batches, over one connection, and goes without it for a while where it fails.

Calls that arrive while an exchange is under way share the next one. A connection for each would have to be
opened in a burst of calls, within a time limit of milliseconds, and a batch takes a third of the processor's
time that its calls would take one by one.
"""

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Final, Generic, Literal, Protocol, TypeVar

from service.errors import ServiceError, UpstreamError
from service.telemetry import names
from service.telemetry.events import emit
from service.telemetry.instruments import Instruments

DEPENDENCY: Final = "valkey"
"""The server's name as a dependency, and its breaker's."""

BREAKER_FAILURES: Final = 3
BREAKER_S: Final = 10.0

MAX_BATCH: Final = 256
MAX_WAITING: Final = 10_000
"""Requests that may wait for the server; further ones go without it."""

SLOW: Final = "slow"
CIRCUIT_OPEN: Final = "circuit_open"
STOPPED: Final = "stopped"

T = TypeVar("T")

logger = logging.getLogger(__name__)


class Request(ABC, Generic[T]):
    """What the server is asked; ``T`` is what it answers."""

    __slots__ = ()

    @property
    @abstractmethod
    def operation(self) -> Literal["count", "look", "lease"]:
        """Its name on the metrics."""


@dataclass(slots=True)
class Waited:
    """How long one request has waited for the server, so that its counts share the time limit."""

    seconds: float = 0.0


class ServerFailedError(Exception):
    """The server did not answer; ``reason`` is one of a few words, fit for an event's attribute."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class Server(Protocol):
    """A server that processes share, and that may be down."""

    async def exchange(self, requests: Sequence[Request[Any]]) -> Sequence[Any]:
        """Ask several things in one round trip; raises whatever its client raises."""
        ...

    def reason_of(self, error: Exception) -> str:
        """Name in a word what ``exchange`` raised."""
        ...

    async def ping(self) -> None:
        """Check that the server works; raises ``UpstreamError`` when it does not."""
        ...


class Breaker(Protocol):
    """A circuit breaker, as the exchange uses it."""

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


_Entry = tuple[Request[Any], asyncio.Future[Any]]
"""A request that waits for the server, and who waits for it."""


class Exchange:
    """The requests that wait for the server, and what is known of the server.

    Args:
        server: The server.
        breaker: Keeps the time limit from being waited for again and again; ``DEPENDENCY``, with
            ``BREAKER_FAILURES`` and ``BREAKER_S``.
        instruments: Measure the requests, and observe whether the server can be had.
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
        self.ping = server.ping
        self._server = server
        self._breaker = breaker
        self._duration = instruments.shared_operation_duration
        self._timeout_s = timeout_s
        self._on_change = on_change
        self._waiting: list[_Entry] = []
        self._wanted = asyncio.Event()
        self._falls_back = False
        self._reason = ""
        instruments.observe_fallback(lambda: self._breaker.state != "closed")

    async def ask(self, request: Request[T], waited: Waited) -> T:
        """Ask the server, for as long as is left of the time limit.

        Args:
            request: What is asked.
            waited: How long the caller has waited before; what this takes is added.

        Raises:
            ServerFailedError: The server did not answer in time, failed, or is not asked at present.
        """
        if self._breaker.rejects:
            self._note_fallback()
            raise ServerFailedError(CIRCUIT_OPEN)
        started_s, outcome = time.perf_counter(), "error"
        try:
            answer = await self._asked(request, self._timeout_s - waited.seconds)
            outcome = "success"
        except ServerFailedError:
            if self._breaker.state != "closed":
                self._note_fallback()
            raise
        finally:
            took_s = time.perf_counter() - started_s
            waited.seconds += took_s
            self._duration.record(took_s, {"operation": request.operation, "outcome": outcome})
        self._note_success()
        return answer

    def tell(self, request: Request[Any]) -> None:
        """Ask with the next exchange, if the server is asked at all; nobody waits for the answer."""
        if self._breaker.rejects or len(self._waiting) >= MAX_WAITING:
            return
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        # Marks an exception as retrieved.
        future.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._waiting.append((request, future))
        self._wanted.set()

    async def _asked(self, request: Request[T], left_s: float) -> T:
        """Let the next exchange ask; raises ``ServerFailedError``."""
        if left_s <= 0 or len(self._waiting) >= MAX_WAITING:
            raise ServerFailedError(SLOW)
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, future))
        self._wanted.set()
        try:
            async with asyncio.timeout(left_s):
                return await future
        except TimeoutError:
            raise ServerFailedError(SLOW) from None

    async def run(self) -> None:
        """Exchange batches with the server until cancelled."""
        try:
            while True:
                await self._wanted.wait()
                batch, self._waiting = self._waiting[:MAX_BATCH], self._waiting[MAX_BATCH:]
                if not self._waiting:
                    self._wanted.clear()
                # Whoever has left, or waited too long, is not asked for.
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
                        answers = await self._server.exchange([request for request, _future in batch])
                    for (_request, future), answer in zip(batch, answers, strict=True):
                        if not future.done():
                            future.set_result(answer)
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
        for _request, future in batch:
            if not future.done():
                future.set_exception(ServerFailedError(reason))

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
