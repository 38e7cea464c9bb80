"""What processes share in a Valkey server; each keeps its own where none is configured."""

from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from service.config.settings import Settings
from service.shared.counts import Counts, LocalCounts, SharedCounts
from service.shared.exchange import DEPENDENCY, Breaker, Exchange
from service.shared.leases import Leases, NoLeases, SharedLeases
from service.telemetry.instruments import Instruments


@dataclass(frozen=True, slots=True)
class SharedState:
    """What is shared.

    Args:
        counts: Count calls against limits.
        leases: Leases on calls.
        pings: The check of the server, by the dependency's name; none without a server.
        background: Coroutine functions that run until the process stops.
    """

    counts: Counts = field(default_factory=LocalCounts)
    leases: Leases = field(default_factory=NoLeases)
    pings: Mapping[str, Callable[[], Awaitable[None]]] = field(default_factory=dict)
    background: tuple[Callable[[], Coroutine[Any, Any, None]], ...] = ()


@asynccontextmanager
async def open_shared(
    settings: Settings,
    instruments: Instruments,
    breaker: Callable[[str], Breaker],
    on_change: Callable[[], None] = lambda: None,
) -> AsyncIterator[SharedState]:
    """Open what is at ``VALKEY_URL``, or this process's own; nothing is sent until it is used.

    Args:
        settings: Where the server is, and its time limit.
        instruments: Measure what is asked.
        breaker: Makes a circuit breaker of this name; with ``BREAKER_FAILURES`` and ``BREAKER_S``.
        on_change: Called when the server begins to fail, and when it works again.
    """
    url = settings.valkey_url.get_secret_value()
    if not url:
        yield SharedState()
        return
    # Its client library takes a fifth of a second to import.
    from service.shared.valkey import open_valkey  # noqa: PLC0415

    async with open_valkey(url) as server:
        exchange = Exchange(
            server, breaker(DEPENDENCY), instruments, settings.valkey_timeout_s, on_change=on_change
        )
        leases = SharedLeases(exchange, instruments.shared_leases)
        yield SharedState(
            SharedCounts(exchange), leases, {DEPENDENCY: exchange.ping}, (exchange.run, leases.run)
        )
