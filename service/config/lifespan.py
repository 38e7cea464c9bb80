"""Opens everything that the process needs, hands it to the requests, and closes it in order."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager

import anyio.to_thread
from fastapi import FastAPI
from opentelemetry.metrics import Histogram

from service.clients.llm import LlmClient, open_llm
from service.config.logging import detach_bridge
from service.config.settings import Settings
from service.services.auth import Authenticator
from service.services.generation import Generation
from service.services.rate_limit import RateLimiter
from service.state import State
from service.telemetry.events import emit
from service.telemetry.names import EVENT_SHUTDOWN_COMPLETED
from service.telemetry.providers import Telemetry

LAG_INTERVAL_S = 0.5
MODELS_RETRY_S = 10.0

logger = logging.getLogger(__name__)


def lifespan_of(
    settings: Settings, telemetry: Telemetry
) -> Callable[[FastAPI], AbstractAsyncContextManager[State]]:
    """The app's lifespan: what it yields is the state of every request."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[State]:
        async with AsyncExitStack() as stack:
            # Entered first, so left last: what is logged while the rest closes is exported too.
            stack.push_async_callback(_flush, telemetry, settings.telemetry_flush_timeout_s)
            llm = await stack.enter_async_context(open_llm(settings, telemetry))
            auth = await anyio.to_thread.run_sync(Authenticator, settings, telemetry.instruments)
            tasks = await stack.enter_async_context(asyncio.TaskGroup())
            background = (
                tasks.create_task(measure_lag(telemetry.instruments.event_loop_lag)),
                tasks.create_task(_keep_models_known(llm, settings.models_ttl_s)),
            )
            yield {
                "auth": auth,
                "generation": Generation(llm, telemetry, settings),
                "rate_limiter": RateLimiter(settings.rate_limit, telemetry.instruments),
            }
            stopping = time.perf_counter()
            for task in background:
                task.cancel()
            stack.callback(_say_completed, stopping)

    return lifespan


def _say_completed(since: float) -> None:
    took_s = time.perf_counter() - since
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
    while True:
        due = loop.time() + interval_s
        await asyncio.sleep(interval_s)
        histogram.record(max(0.0, loop.time() - due))


async def _keep_models_known(llm: LlmClient, ttl_s: float) -> None:
    while True:
        learned = False
        try:
            learned = await llm.learn_models()
        except Exception:
            # A bug here must not take the lifespan down with it, and the requests in flight.
            logger.exception("The list of models could not be read")
        await asyncio.sleep(ttl_s if learned else min(MODELS_RETRY_S, ttl_s))
