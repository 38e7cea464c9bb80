"""Knows which dependencies are up: pings them in the background, and answers from memory."""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from opentelemetry.context import Context
from opentelemetry.instrumentation.utils import suppress_instrumentation
from opentelemetry.trace import Status, StatusCode, Tracer

from service.errors import ServiceError
from service.telemetry import names
from service.telemetry.events import emit
from service.telemetry.instruments import Instruments

JITTER = 0.1
MAX_REASON_CHARS = 200

Ping = Callable[[], Awaitable[None]]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """How one check ended.

    Args:
        error: Why the dependency counts as down; None when it is up.
        latency_s: Seconds that the check took.
        at: When it ended, on the monotonic clock.
    """

    error: str | None
    latency_s: float
    at: float


@dataclass(frozen=True)
class Health:
    """What is known of a dependency now; ``age_s`` and ``latency_s`` are None before the first result."""

    up: bool
    error: str | None
    latency_s: float | None = None
    age_s: float | None = None


class HealthChecker:
    """Runs named pings, one at a time for each, and keeps their last results.

    Asking it costs nothing and waits for nobody. A result is believed for ``ttl_s``; before the first, and
    after that time, a dependency counts as down, with the reason said.

    Args:
        pings: What raises when a dependency is down, by the dependency's name.
        interval_s: Seconds between two checks of a dependency, give or take a tenth.
        timeout_s: Time limit of one check.
        ttl_s: Age up to which a result is believed.
        instruments: Where statuses, ages and durations are shown.
        tracer: For the one span of each check.
        clock: Monotonic, in seconds.
        random_part: Between 0 and 1.
    """

    def __init__(  # noqa: PLR0913 - numbers and seams
        self,
        pings: Mapping[str, Ping],
        *,
        interval_s: float,
        timeout_s: float,
        ttl_s: float,
        instruments: Instruments,
        tracer: Tracer,
        clock: Callable[[], float] = time.monotonic,
        random_part: Callable[[], float] = random.random,
    ) -> None:
        self._pings = dict(pings)
        self._interval_s = interval_s
        self._timeout_s = timeout_s
        self._ttl_s = ttl_s
        self._durations = instruments.health_check_duration
        self._tracer = tracer
        self._clock = clock
        self._random_part = random_part
        self._results: dict[str, Result] = {}
        self._asked = {name: asyncio.Event() for name in self._pings}
        instruments.show_health(
            lambda: {name: (health.up, health.age_s) for name, health in self.health().items()}
        )

    def health(self) -> dict[str, Health]:
        """What is known now, by dependency; may be asked from any thread."""
        return {name: self._health_of(name) for name in self._pings}

    def _health_of(self, name: str) -> Health:
        result = self._results.get(name)
        if result is None:
            return Health(up=False, error="not checked yet")
        age_s = max(0.0, self._clock() - result.at)
        if age_s > self._ttl_s:
            return Health(up=False, error="the last check is too old", age_s=age_s)
        return Health(result.error is None, result.error, result.latency_s, age_s)

    def look_again(self, name: str) -> None:
        """Check a dependency at once, because something says that it changed; still one check at a time."""
        if name in self._asked:
            self._asked[name].set()

    async def run(self) -> None:
        """Check for ever; ends by cancellation only."""
        async with asyncio.TaskGroup() as group:
            for name, ping in self._pings.items():
                group.create_task(self._keep_checking(name, ping), name=f"health of {name}")

    async def _keep_checking(self, name: str, ping: Ping) -> None:
        asked = self._asked[name]
        while True:
            asked.clear()
            await self._check(name, ping)
            jitter = 1 + JITTER * (2 * self._random_part() - 1)
            try:
                async with asyncio.timeout(self._interval_s * jitter):
                    await asked.wait()
            except TimeoutError:
                continue

    async def _check(self, name: str, ping: Ping) -> None:
        # A root of its own, and nothing below it: what a ping sends is not worth a span.
        with self._tracer.start_as_current_span(
            names.SPAN_HEALTH_CHECK, context=Context(), attributes={"dependency": name}
        ) as span:
            started = self._clock()
            error = await self._error_of(ping)
            ended = self._clock()
            self._durations.record(ended - started, {"dependency": name})
            before = self._results.get(name)
            self._results[name] = Result(error, ended - started, ended)
            if error is not None:
                span.set_status(Status(StatusCode.ERROR))
            if before is None or (before.error is None) != (error is None):
                self._say(name, error)

    async def _error_of(self, ping: Ping) -> str | None:
        try:
            with suppress_instrumentation():
                async with asyncio.timeout(self._timeout_s):
                    await ping()
        except TimeoutError:
            return f"no answer within {self._timeout_s:g} s"
        except ServiceError as error:
            reason = error.label if error.cause is None else f"{error.label} ({error.cause})"
            return reason[:MAX_REASON_CHARS]
        except Exception as error:  # noqa: BLE001 - a ping may fail in any way, and none may end the checks
            return type(error).__name__
        return None

    def _say(self, name: str, error: str | None) -> None:
        up = error is None
        emit(
            logger,
            names.EVENT_HEALTH_CHANGED,
            f"{name} is up" if up else f"{name} is down: {error}",
            {"dependency": name} if error is None else {"dependency": name, "error": error},
            level=logging.INFO if up else logging.WARNING,
        )
