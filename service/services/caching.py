"""Puts the cache together, and brings what it still holds into the store when the process stops."""

from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from service.clients.llm import LlmClient
from service.clients.vectors import Vectors
from service.config.settings import Settings
from service.services.cache_admin import CacheAdmin
from service.services.cache_memory import EntryMemory
from service.services.cache_semantic import SemanticIndex
from service.services.cache_store import CacheStore
from service.services.cache_sweeper import CacheSweeper
from service.services.cache_writer import CacheWriter
from service.services.circuit_breaker import CircuitBreaker
from service.services.response_cache import ResponseCache
from service.telemetry.providers import SCOPE, Telemetry

BREAKER_FAILURES = 3
BREAKER_S = 10.0
"""A store that fails is asked again after so long. Three slow look-ups, of ``CACHE_TIMEOUT_S`` each, is what
its failing may cost in that time."""

TRUSTED_S = 10.0
"""With a server other processes may clear the cache; what is in this process's memory is looked up again."""

FLUSH_LIMIT_S = 0.8


@dataclass(frozen=True)
class Caching:
    """The cache, how to look after it, and what it does in the background."""

    cache: ResponseCache
    admin: CacheAdmin
    background: tuple[Callable[[], Coroutine[Any, Any, None]], ...]


@asynccontextmanager
async def open_cache(
    settings: Settings,
    telemetry: Telemetry,
    vectors: Vectors,
    llm: LlmClient,
    on_failing: Callable[[], None],
) -> AsyncIterator[Caching | None]:
    """The cache, where it is on; on the way out, what waits is written.

    Args:
        settings: Its settings.
        telemetry: Where spans and counts go.
        vectors: Where entries are kept.
        llm: Makes the vectors of questions.
        on_failing: Called when the store has failed after it had worked.
    """
    if not settings.cache_enabled:
        yield None
        return
    instruments = telemetry.instruments
    tracer = telemetry.tracer_provider.get_tracer(SCOPE)
    breaker = CircuitBreaker("qdrant", BREAKER_FAILURES, BREAKER_S, instruments)
    store = CacheStore(
        vectors,
        breaker,
        tracer,
        settings.cache_timeout_s,
        search_breaker=CircuitBreaker("qdrant_search", BREAKER_FAILURES, BREAKER_S, instruments),
        on_failing=on_failing,
    )
    sweeper = CacheSweeper(store, vectors, settings.cache_max_entries, tracer)
    writer = CacheWriter(store, instruments, tracer, settings.cache_queue_bytes, after=sweeper.count_written)
    memory = EntryMemory(settings.cache_memory_bytes, TRUSTED_S if vectors.is_server else None)
    semantic = None
    if settings.cache_semantic:
        embedding_breaker = CircuitBreaker("embeddings", BREAKER_FAILURES, BREAKER_S, instruments)
        semantic = SemanticIndex(llm, store, settings, embedding_breaker)
    cache = ResponseCache(store, memory, writer, sweeper, semantic, settings, instruments, tracer)
    try:
        yield Caching(cache, CacheAdmin(cache, vectors, settings), (writer.run, sweeper.run))
    finally:
        await writer.flush(FLUSH_LIMIT_S)
