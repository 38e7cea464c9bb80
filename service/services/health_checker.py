"""Checks the dependencies in the background and when somebody asks, and serves the latest results."""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass

from opentelemetry.context import Context
from opentelemetry.instrumentation.utils import suppress_instrumentation
from opentelemetry.trace import Status, StatusCode, Tracer

from service.errors import ServiceError
from service.telemetry import names
from service.telemetry.events import emit
from service.telemetry.instruments import Instruments

MAX_JITTER = 0.1
MAX_REASON_CHARS = 200
FRESH_S = 1.0
"""Age up to which a result is served to those who ask; an older one is renewed. Many who ask therefore cause
at most one check a second."""


Ping = Callable[[], Awaitable[None]]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """The result of one check.

    Args:
        error: Why the dependency is down; None when it is up.
        latency_s: Duration of the check, in seconds.
        at: End of the check, on the monotonic clock.
    """

    error: str | None
    latency_s: float
    at: float


@dataclass(frozen=True)
class Health:
    """The current health of a dependency; ``age_s`` and ``latency_s`` are None before the first result."""

    up: bool
    error: str | None
    latency_s: float | None = None
    age_s: float | None = None


@dataclass(frozen=True)
class HealthSchedule:
    """When dependencies are checked, and how long a result is valid.

    Args:
        interval_s: Seconds between two checks of a dependency, varied by up to 10 %.
        timeout_s: Time limit of one check, in seconds.
        ttl_s: Maximum age of a result, in seconds.
        clock: Monotonic, in seconds.
        jitter: Returns a random number between 0 and 1.
    """

    interval_s: float
    timeout_s: float
    ttl_s: float
    clock: Callable[[], float] = time.monotonic
    jitter: Callable[[], float] = random.random


class HealthChecker:
    """Runs one ping per dependency at a time, and keeps the latest results.

    Before the first result, and when the latest one is older than ``ttl_s``, a dependency counts as down.

    Args:
        pings: By the name of the dependency, a coroutine function that raises when the dependency is down.
        schedule: The intervals and time limits.
        instruments: Observes status and age, and records durations.
        tracer: Makes one span per check.
    """

    def __init__(
        self, pings: Mapping[str, Ping], schedule: HealthSchedule, instruments: Instruments, tracer: Tracer
    ) -> None:
        self._pings = dict(pings)
        self._schedule = schedule
        self._durations = instruments.health_check_duration
        self._tracer = tracer
        self._results: dict[str, Result] = {}
        self._requested = {name: asyncio.Event() for name in self._pings}
        self._finished = {name: asyncio.Event() for name in self._pings}
        """Set, and replaced, at the end of each check."""
        self._checking: set[str] = set()
        instruments.observe_health(
            lambda: {name: (health.up, health.age_s) for name, health in self.health().items()}
        )

    def health(self) -> dict[str, Health]:
        """Return the current health by dependency; may be called from any thread."""
        return {name: self._health_of(name) for name in self._pings}

    def _health_of(self, name: str) -> Health:
        result = self._results.get(name)
        if result is None:
            return Health(up=False, error="not checked yet")
        age_s = max(0.0, self._schedule.clock() - result.at)
        if age_s > self._schedule.ttl_s:
            return Health(up=False, error="the last check is too old", age_s=age_s)
        return Health(result.error is None, result.error, result.latency_s, age_s)

    def check_now(self, name: str) -> None:
        """Check a dependency now, because its state may have changed; at most one check runs at a time."""
        if name in self._requested:
            self._requested[name].set()

    async def refresh(self, awaited: Collection[str]) -> None:
        """Check again each dependency whose result is older than ``FRESH_S``, and wait for the results.

        Those who ask at the same time wait for the same check. The wait ends after the time limit of a check.

        Args:
            awaited: The dependencies whose results are waited for; a slow one among the others delays nobody.
        """
        now = self._schedule.clock()
        old = [
            name
            for name in self._pings
            if (result := self._results.get(name)) is None or now - result.at > FRESH_S
        ]
        for name in old:
            # A check that is under way is the answer; another request would be followed by another check.
            if name not in self._checking:
                self.check_now(name)
        finished = [self._finished[name] for name in old if name in awaited]
        with suppress(TimeoutError):
            async with asyncio.timeout(self._schedule.timeout_s):
                for event in finished:
                    await event.wait()

    async def run(self) -> None:
        """Check the dependencies until cancelled."""
        async with asyncio.TaskGroup() as group:
            for name, ping in self._pings.items():
                group.create_task(self._keep_checking(name, ping), name=f"health of {name}")

    async def _keep_checking(self, name: str, ping: Ping) -> None:
        requested = self._requested[name]
        while True:
            requested.clear()
            self._checking.add(name)
            try:
                await self._check(name, ping)
            finally:
                self._checking.discard(name)
                self._finished[name].set()
                self._finished[name] = asyncio.Event()
            jitter = 1 + MAX_JITTER * (2 * self._schedule.jitter() - 1)
            try:
                async with asyncio.timeout(self._schedule.interval_s * jitter):
                    await requested.wait()
            except TimeoutError:
                continue

    async def _check(self, name: str, ping: Ping) -> None:
        # A root span without children: the ping's own requests are not traced.
        with self._tracer.start_as_current_span(
            names.SPAN_HEALTH_CHECK, context=Context(), attributes={"dependency": name}
        ) as span:
            started = self._schedule.clock()
            error = await self._error_of(ping)
            ended = self._schedule.clock()
            self._durations.record(ended - started, {"dependency": name})
            before = self._results.get(name)
            self._results[name] = Result(error, ended - started, ended)
            if error is not None:
                span.set_status(Status(StatusCode.ERROR))
            if before is None or (before.error is None) != (error is None):
                self._report_change(name, error)

    async def _error_of(self, ping: Ping) -> str | None:
        try:
            with suppress_instrumentation():
                async with asyncio.timeout(self._schedule.timeout_s):
                    await ping()
        except TimeoutError:
            return f"no answer within {self._schedule.timeout_s:g} s"
        except ServiceError as error:
            reason = error.label if error.cause is None else f"{error.label} ({error.cause})"
            return reason[:MAX_REASON_CHARS]
        except Exception as error:  # noqa: BLE001 - a ping may fail in any way, and none may end the checks
            return type(error).__name__
        return None

    def _report_change(self, name: str, error: str | None) -> None:
        up = error is None
        emit(
            logger,
            names.EVENT_HEALTH_CHANGED,
            f"{name} is up" if up else f"{name} is down: {error}",
            {"dependency": name} if error is None else {"dependency": name, "error": error},
            level=logging.INFO if up else logging.WARNING,
        )
