"""Opens everything that the process needs, hands it to the requests, and closes it in order.

The order of the stop is written here.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from typing import TypeVar

import anyio.to_thread
from fastapi import FastAPI
from opentelemetry.metrics import Histogram

from service.cache.coalescing import Coalescing, NoCoalescing
from service.cache.response_cache import BREAKER_FAILURES, BREAKER_S, open_cache, open_store
from service.cache.store import Guard
from service.config.logging import detach_bridge, drain_lines
from service.config.settings import Settings
from service.dependencies import AppServices, StreamTimes
from service.identity.accounts import Accounts
from service.identity.callers import Callers
from service.identity.changes import ChangeFeed
from service.identity.database import DatabaseFailedError, open_database
from service.identity.keys import ApiKeys, key_secret
from service.identity.ledger import open_ledger, records_kept_s
from service.identity.oidc import open_oidc
from service.identity.response_owners import open_response_owners
from service.identity.tokens import Authenticator
from service.recording.recorder import open_recorder
from service.services.circuit_breaker import CircuitBreaker
from service.services.drain import Drain, drain_on_signal
from service.services.generation import Generation
from service.services.health_checker import HealthChecker, HealthSchedule
from service.services.rate_limit import RateLimiter
from service.services.replicas import connect_budgets, connect_replicas
from service.shared import exchange
from service.shared.news import SPENT, open_news
from service.shared.state import open_shared
from service.telemetry.events import emit
from service.telemetry.names import EVENT_SHUTDOWN_COMPLETED, EVENT_SHUTDOWN_STEP
from service.telemetry.providers import SCOPE, Telemetry
from service.upstream.client import LlmClient, open_llm

LAG_INTERVAL_S = 0.5
STEPS_TIMEOUT_S = 1.5
"""Time limit of all steps of the stop together, between the drain and the flush of the telemetry, in seconds.

It is the limit where the drain took all its time; the steps may use what the drain left, too. The flush takes
up to 2.5 s, uvicorn and the interpreter 0.5 s, and the whole stop must end within 5 s of the drain."""

STEP_TIMEOUT_S = 1.0
"""Time limit of one step, the recorder's excepted."""

FINALIZING_TIMEOUT_S = 8.0
"""Time limit of the recorder's step: an MLflow server under load takes seconds for the last records, the
totals and the end of the run."""

MIN_STEP_S = 0.1
"""Time that a step gets at least, whatever the steps before it took."""

MODELS_RETRY_S = 10.0

T = TypeVar("T")

logger = logging.getLogger(__name__)


def lifespan_of(
    settings: Settings, telemetry: Telemetry
) -> Callable[[FastAPI], AbstractAsyncContextManager[Mapping[str, AppServices]]]:
    """The app's lifespan; what it yields is the ASGI state of every request.

    The stop runs the contexts below from the last one entered to the first: background work ends, the
    connections to Valkey are closed, the cache is flushed, the vector store closed, the MLflow run finalized,
    the upstream client closed, telemetry flushed.
    """

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[Mapping[str, AppServices]]:
        drain = Drain(settings.shutdown_grace_s, settings.shutdown_timeout_s)
        async with AsyncExitStack() as stack:
            # A worker of uvicorn ends by its signal, which runs no exit handlers: its lines are written here.
            stack.push_async_callback(anyio.to_thread.run_sync, drain_lines)
            stack.push_async_callback(_flush, telemetry, settings.telemetry_flush_timeout_s)
            stack.callback(_say_completed, drain)
            # Before anything is opened: a process that is stopped while it starts says so too.
            stack.enter_context(drain_on_signal(drain, await stack.enter_async_context(asyncio.TaskGroup())))
            closing = _Closing(stack, lambda: settings.shutdown_timeout_s - drain.since_signal_s)
            services = await _open_services(settings, telemetry, drain, stack, closing)
            yield {"services": services}

    return lifespan


async def _open_services(
    settings: Settings, telemetry: Telemetry, drain: Drain, stack: AsyncExitStack, closing: "_Closing"
) -> AppServices:
    """Open the clients and start the background work; ``closing`` ends them in the reverse order."""
    instruments = telemetry.instruments
    database = await closing.enter(open_database(settings, instruments))
    responses = await closing.enter(open_response_owners(database))
    llm = await closing.enter(open_llm(settings, telemetry))
    ledger = await closing.enter(
        open_ledger(database, instruments, known=llm.known, records_kept_s=records_kept_s(settings))
    )
    recorder = await closing.enter(
        open_recorder(settings, telemetry, ledger), "Finalizing MLflow run...", FINALIZING_TIMEOUT_S
    )
    store = await closing.enter(open_store(settings), "Closing Qdrant connections...")
    cache = await closing.enter(
        open_cache(
            settings,
            telemetry,
            llm,
            store,
            Guard(
                lambda name: CircuitBreaker(name, BREAKER_FAILURES, BREAKER_S, instruments),
                lambda: health.check_now("qdrant"),
            ),
        ),
        "Flushing cache...",
    )
    shared = await closing.enter(
        open_shared(
            settings,
            instruments,
            lambda name: CircuitBreaker(name, exchange.BREAKER_FAILURES, exchange.BREAKER_S, instruments),
            lambda: health.check_now(exchange.DEPENDENCY),
        ),
        "Closing Valkey connections..." if settings.valkey_url.get_secret_value() else "",
    )
    news = await closing.enter(open_news(settings, instruments))
    spendings = await closing.enter(open_news(settings, instruments, SPENT))
    feed = ChangeFeed(database, settings.identity_stale_s)
    keys = ApiKeys(database, key_secret(settings), feed)
    accounts = Accounts(database, feed)
    with suppress(DatabaseFailedError):
        # So that the first request finds users and teams; if it fails, callers get 503 until it works.
        await feed.poll()
    make_auth = partial(
        Authenticator,
        settings,
        instruments,
        counts=shared.counts,
        is_disabled=lambda name: accounts.user(name).disabled,
    )
    auth = await anyio.to_thread.run_sync(make_auth)
    oidc = await closing.enter(open_oidc(settings))
    health = HealthChecker(
        {"qdrant": store.ping, "litellm": llm.ping, **recorder.pings, **oidc.pings, **shared.pings},
        HealthSchedule(settings.health_interval_s, settings.health_timeout_s, settings.health_ttl_s),
        instruments,
        telemetry.tracer_provider.get_tracer(SCOPE),
    )
    tasks = await stack.enter_async_context(asyncio.TaskGroup())
    generation = Generation(
        llm,
        telemetry,
        settings,
        cache=cache.answers,
        coalescing=Coalescing(tasks.create_task) if settings.cache_enabled else NoCoalescing(),
        leases=shared.leases,
        recorder=recorder,
        on_unreachable=lambda: health.check_now("litellm"),
    )
    callers = Callers(auth, keys, oidc, accounts, instruments.auth_attempts)
    connect_replicas(news, callers, cache.admin, generation)
    connect_budgets(spendings, ledger.budgets)
    await asyncio.gather(news.catch_up(), spendings.catch_up())
    for work in (
        measure_lag(instruments.event_loop_lag),
        _keep_models_known(llm, settings.models_ttl_s),
        health.run(),
        responses.run(),
        feed.run(),
        keys.run(),
        ledger.run(),
        oidc.run(),
        news.run(),
        spendings.run(),
        *(start() for start in (*cache.background, *shared.background)),
    ):
        stack.callback(tasks.create_task(work).cancel)
    return AppServices(
        auth=auth,
        callers=callers,
        keys=keys,
        accounts=accounts,
        ledger=ledger,
        generation=generation,
        cache=cache.admin,
        rate_limiter=RateLimiter(settings.rate_limit, instruments, shared.counts),
        drain=drain,
        health=health,
        # With several issuers, each of them is required.
        health_required=frozenset(settings.health_required)
        | (oidc.pings.keys() if "oidc" in settings.health_required else frozenset()),
        stream_times=StreamTimes(keep_alive_s(settings), settings.stream_write_timeout_s),
        pass_litellm_fields=frozenset(settings.pass_litellm_fields),
        responses=responses,
    )


class _Closing:
    """Closes contexts in order, whatever closing one raises: each within a limit, all within another.

    Args:
        stack: Closes them in the reverse order of entering.
        spare_s: Seconds that the drain left of its time, asked when the first context is closed.
    """

    def __init__(self, stack: AsyncExitStack, spare_s: Callable[[], float]) -> None:
        self._stack = stack
        self._spare_s = spare_s
        self._until_s: float | None = None

    async def enter(
        self, context: AbstractAsyncContextManager[T], line: str = "", limit_s: float = STEP_TIMEOUT_S
    ) -> T:
        """Enter a context; ``line`` is logged when it is closed, within ``limit_s`` seconds."""
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
        return max(MIN_STEP_S, self._until_s - now)


def keep_alive_s(settings: Settings) -> float:
    """Seconds of silence until a stream gets a comment: as set, or half of a shorter silence limit."""
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
    """Record, until cancelled, how much later than requested the event loop wakes this task."""
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
