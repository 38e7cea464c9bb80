"""Opens everything that the process needs, hands it to the requests, and closes it in order."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import TypeVar

import anyio.to_thread
from fastapi import FastAPI
from opentelemetry.metrics import Histogram

from service.cache.coalescing import Flights
from service.cache.response_cache import CacheFacts, open_cache
from service.cache.store import open_vectors
from service.config.logging import detach_bridge, drain_lines
from service.config.settings import Settings
from service.dependencies import State
from service.identity.tokens import Authenticator
from service.recording.mlflow import Tracker
from service.recording.record import CallRecord
from service.recording.recorder import Recorder
from service.services.drain import Drain, drain_on_signal
from service.services.generation import Generation
from service.services.health_checker import HealthChecker, HealthSchedule, Ping
from service.services.rate_limit import RateLimiter
from service.telemetry.events import emit
from service.telemetry.names import EVENT_SHUTDOWN_COMPLETED, EVENT_SHUTDOWN_STEP
from service.telemetry.providers import SCOPE, Telemetry
from service.upstream.client import LlmClient, open_llm

LAG_INTERVAL_S = 0.5
STEPS_TIMEOUT_S = 1.5
"""Time limit of all steps of the stop between the drain and the flush of the telemetry, where the drain took
all its time: the flush may take two and a half seconds, uvicorn and the interpreter half a one, and the whole
stop five seconds beyond the drain. What the drain left of its time is theirs, too."""

STEP_TIMEOUT_S = 1.0
"""Time limit of one of them, but for the recorder's, which has work to do."""

FINALIZING_TIMEOUT_S = 8.0
"""The recorder's: a server under load takes seconds for the last records, the totals and the run's end."""

LAST_STEP_S = 0.1
"""What a step gets at least, whatever those before it took."""

MODELS_RETRY_S = 10.0

T = TypeVar("T")

logger = logging.getLogger(__name__)


def lifespan_of(
    settings: Settings, telemetry: Telemetry
) -> Callable[[FastAPI], AbstractAsyncContextManager[State]]:
    """The app's lifespan: what it yields is the state of every request."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[State]:
        drain = Drain(settings.shutdown_grace_s, settings.shutdown_timeout_s)
        # What is entered first is left last: the order of the stop is this one, read from below.
        async with AsyncExitStack() as stack:
            # A worker of uvicorn ends by its signal, which runs nothing at exit: its lines are written here.
            stack.push_async_callback(anyio.to_thread.run_sync, drain_lines)
            stack.push_async_callback(_flush, telemetry, settings.telemetry_flush_timeout_s)
            stack.callback(_say_completed, drain)
            # Before anything is opened: whoever is stopped while starting says so too.
            stack.enter_context(drain_on_signal(drain, await stack.enter_async_context(asyncio.TaskGroup())))
            closing = _Closing(stack, lambda: settings.shutdown_timeout_s - drain.since_signal_s)
            llm = await closing.enter(open_llm(settings, telemetry))
            recorder = await closing.enter(
                _recording(settings, telemetry), "Finalizing MLflow run...", FINALIZING_TIMEOUT_S
            )
            vectors = await closing.enter(open_vectors(settings), "Closing Qdrant connections...")
            caching = await closing.enter(
                open_cache(settings, telemetry, vectors, llm, lambda: health.check_now("qdrant")),
                "Flushing cache...",
            )
            auth = await anyio.to_thread.run_sync(Authenticator, settings, telemetry.instruments)
            pings: dict[str, Ping] = {"qdrant": vectors.ping, "litellm": llm.ping}
            if recorder is not None:
                pings["mlflow"] = recorder.tracker.ping
            health = HealthChecker(
                pings,
                HealthSchedule(settings.health_interval_s, settings.health_timeout_s, settings.health_ttl_s),
                telemetry.instruments,
                telemetry.tracer_provider.get_tracer(SCOPE),
            )
            tasks = await stack.enter_async_context(asyncio.TaskGroup())
            generation = Generation(
                llm,
                telemetry,
                settings,
                on_unreachable=lambda: health.check_now("litellm"),
                on_ended=recorder.record if recorder else _record_nothing,
                cache=caching.cache if caching else None,
                flights=Flights(tasks.create_task) if caching else None,
            )
            for work in (
                measure_lag(telemetry.instruments.event_loop_lag),
                _keep_models_known(llm, settings.models_ttl_s),
                health.run(),
                *(work() for work in (caching.background if caching else ())),
            ):
                stack.callback(tasks.create_task(work).cancel)
            yield {
                "auth": auth,
                "generation": generation,
                "cache": caching.admin if caching else None,
                "cache_facts": CacheFacts.of(settings),
                "rate_limiter": RateLimiter(settings.rate_limit, telemetry.instruments),
                "drain": drain,
                "health": health,
                "health_required": frozenset(settings.health_required),
                "stream_keep_alive_s": keep_alive_s(settings),
            }

    return lifespan


class _Closing:
    """Leaves contexts in order, whatever leaving one raises: each within a limit, all within another.

    Args:
        stack: Where they are entered.
        spare_s: What is left of the drain's time when the first one is left.
    """

    def __init__(self, stack: AsyncExitStack, spare_s: Callable[[], float]) -> None:
        self._stack = stack
        self._spare_s = spare_s
        self._until_s: float | None = None

    async def enter(
        self, context: AbstractAsyncContextManager[T], line: str = "", limit_s: float = STEP_TIMEOUT_S
    ) -> T:
        """Enter a context, to be left with this line."""
        entered = await context.__aenter__()

        async def leave() -> None:
            if line:
                emit(logger, EVENT_SHUTDOWN_STEP, line, {})
            try:
                async with asyncio.timeout(min(limit_s, self._left_s())):
                    await context.__aexit__(None, None, None)
            except TimeoutError:
                logger.warning("A step of the stop was not done in time", extra={"step": line})
            except Exception:
                # The next step must come all the same.
                logger.exception("A step of the stop failed")

        self._stack.push_async_callback(leave)
        return entered

    def _left_s(self) -> float:
        now = asyncio.get_running_loop().time()
        if self._until_s is None:
            self._until_s = now + STEPS_TIMEOUT_S + max(0.0, self._spare_s())
        return max(LAST_STEP_S, self._until_s - now)


@asynccontextmanager
async def _recording(settings: Settings, telemetry: Telemetry) -> AsyncIterator[Recorder | None]:
    if not settings.mlflow_tracking_uri:
        logger.info("MLFLOW_TRACKING_URI is not set: calls are not recorded in MLflow")
        yield None
        return
    tracer = telemetry.tracer_provider.get_tracer(SCOPE)
    tracker = Tracker(settings, telemetry.identity)
    recorder = await anyio.to_thread.run_sync(Recorder, tracker, settings, telemetry.instruments, tracer)
    recorder.start()
    try:
        yield recorder
    finally:
        await recorder.finish()


def _record_nothing(_record: CallRecord) -> None:
    """Where there is no MLflow."""


def keep_alive_s(settings: Settings) -> float:
    """Seconds of a stream's silence until a comment; the default gives way to a shorter limit of silence."""
    asked_s, limit_s = settings.stream_keep_alive_s, settings.stream_chunk_timeout_s
    return asked_s if asked_s < limit_s else limit_s / 2


def _say_completed(drain: Drain) -> None:
    took_s = drain.since_signal_s
    emit(
        logger,
        EVENT_SHUTDOWN_COMPLETED,
        f"Graceful shutdown completed in {took_s:.1f}s",
        {"duration_s": round(took_s, 3)},
    )


async def _flush(telemetry: Telemetry, deadline_s: float) -> None:
    detach_bridge()
    if not await anyio.to_thread.run_sync(telemetry.shutdown, deadline_s):
        logger.warning("Telemetry was not flushed within %g s; what was left is lost", deadline_s)


async def measure_lag(histogram: Histogram, interval_s: float = LAG_INTERVAL_S) -> None:
    """Record for ever how much later than asked for the event loop wakes this task."""
    loop = asyncio.get_running_loop()
    # The first sample comes at once, so that the series is there from the start.
    wait_s = 0.0
    while True:
        due = loop.time() + wait_s
        await asyncio.sleep(wait_s)
        histogram.record(max(0.0, loop.time() - due))
        wait_s = interval_s


async def _keep_models_known(llm: LlmClient, ttl_s: float) -> None:
    while True:
        learned = False
        try:
            learned = await llm.learn_models()
        except Exception:
            # A bug here must not take the lifespan down with it, and the requests in flight.
            logger.exception("The list of models could not be read")
        await asyncio.sleep(ttl_s if learned else min(MODELS_RETRY_S, ttl_s))
