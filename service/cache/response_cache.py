"""Puts the cache together, and brings what it still holds into the store when the process stops."""

import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Self

from opentelemetry.trace import Span, SpanContext, Tracer

from service.cache.control import CacheUse, CacheWish, Kind, Result
from service.cache.entries import Assembler, DamagedEntryError, Entry, EntryMemory, entry_of
from service.cache.keys import CacheKey, key_of, tenant_of
from service.cache.semantic import Near, Question, SemanticIndex
from service.cache.store import COLLECTION, CacheStore, Point, StoreError, Vectors
from service.cache.sweeper import CacheSweeper
from service.cache.writer import CacheWriter, Write
from service.config.settings import Settings
from service.errors import UpstreamError, ValidationError
from service.services.call_report import Call
from service.services.circuit_breaker import CircuitBreaker
from service.telemetry import names
from service.telemetry.instruments import Instruments
from service.telemetry.providers import SCOPE, Telemetry
from service.upstream.client import LlmClient
from service.upstream.messages import Reply

VECTOR_BYTES = 8


@dataclass(slots=True)
class Ticket:
    """One call's way through the cache.

    Args:
        key: Where its answer is kept.
        wish: What its caller wants of the cache.
        epoch: How often the cache had been cleared when the call came.
        question: What it asks, where that could be compared.
    """

    key: CacheKey
    wish: CacheWish
    epoch: int
    question: Question | None = None


class ResponseCache:
    """Finds stored answers and takes new ones; whatever happens, the call goes on.

    Args:
        store: The vector store.
        memory: The entries used last.
        writer: Brings entries to the store.
        sweeper: Takes out what is too old, or damaged.
        semantic: Finds questions by their meaning; None where that is off.
        settings: Whose answers are whose, for how long, and how large.
        instruments: Where look-ups are counted.
        tracer: For the span of each look-up.
        now: Unix time in seconds.
        clock: For durations, in seconds.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - the parts of it, put together in one place
        self,
        store: CacheStore,
        memory: EntryMemory,
        writer: CacheWriter,
        sweeper: CacheSweeper,
        semantic: SemanticIndex | None,
        settings: Settings,
        instruments: Instruments,
        tracer: Tracer,
        *,
        now: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.store = store
        self.memory = memory
        self.writer = writer
        self.sweeper = sweeper
        self._semantic = semantic
        self._settings = settings
        self._instruments = instruments
        self._tracer = tracer
        self._now = now
        self._clock = clock
        # Two deployments may have the same Qdrant, and the same names of users and models.
        self._realm = f"{settings.environment} {settings.litellm_url}"
        self.epoch = 0
        self.results: dict[Result, int] = {"hit": 0, "miss": 0, "bypass": 0, "error": 0}

    def ticket(self, call: Call) -> Ticket | None:
        """The call's ticket; None where its answer is not one to be stored, nor to be looked for."""
        if not self._may_store(call):
            self._count(call.cache, "exact", "bypass")
            return None
        tenant = self.tenant(call.user)
        try:
            key = key_of(tenant, call.model, call.body, call.headers)
        except RecursionError:
            self._count(call.cache, "exact", "bypass")
            return None
        if not call.wish.read:
            self._count(call.cache, "exact", "bypass")
        return Ticket(key, call.wish, self.epoch)

    def tenant(self, user: str) -> str:
        """Whose answers a user gets."""
        return tenant_of(None if self._settings.cache_scope == "shared" else user, self._realm)

    def _may_store(self, call: Call) -> bool:
        if call.operation != "chat":
            return False
        temperature = call.body.get("temperature")
        # An absent temperature is 1.
        return self._settings.cache_sampled or (temperature is not None and temperature == 0)

    def recall(self, call: Call, ticket: Ticket) -> Entry | None:
        """The answer, where this process has it in its memory: at once, without anything to wait for."""
        started = self._clock()
        entry = self.memory.get(ticket.key.digest) if ticket.wish.read else None
        if entry is None or not self._will_do(entry, ticket):
            return None
        with self._span() as span:
            call.cache.age_s = max(0.0, self._now() - entry.created_at)
            self._count(call.cache, "exact", "hit", started)
            self._describe(span, call.cache)
        call.cache.lookup_s = self._clock() - started
        return entry

    def _span(self) -> AbstractContextManager[Span]:
        return self._tracer.start_as_current_span(
            names.SPAN_CACHE_LOOKUP, record_exception=False, set_status_on_exception=False
        )

    async def look_up(self, call: Call, ticket: Ticket, in_flight: Callable[[str], bool]) -> Entry | None:
        """The answer in the store; None where there is none, or where an equal call is under way.

        What came of it stands in ``call.cache`` afterwards; there, too, a call under way is a hit.

        Args:
            call: The call.
            ticket: Its ticket.
            in_flight: Whether a call with this digest is under way, whose answer this one will get.
        """
        started = self._clock()
        try:
            with self._span() as span:
                entry = await self._find(call, ticket, in_flight)
                self._describe(span, call.cache)
        finally:
            call.cache.lookup_s = self._clock() - started
        return entry

    async def _find(self, call: Call, ticket: Ticket, in_flight: Callable[[str], bool]) -> Entry | None:
        started = self._clock()
        entry: Entry | None = None
        result: Result = "hit"
        if not in_flight(ticket.key.digest):
            entry, result = await self._read(ticket)
        if entry is None and in_flight(ticket.key.digest):
            call.cache.shared = True
            result = "hit"
        looks_on = result == "miss" and self._semantic is not None
        self._count(call.cache, "exact", result, started, final=not looks_on)
        if entry is not None:
            call.cache.age_s = max(0.0, self._now() - entry.created_at)
        if not looks_on:
            return entry
        return await self._find_near(call, ticket, in_flight)

    async def _read(self, ticket: Ticket) -> tuple[Entry | None, Result]:
        """Ask the store for exactly this question."""
        try:
            entry = await self._entry(ticket.key)
        except StoreError:
            # What this process has still is as good as when it was stored.
            entry = self.memory.get(ticket.key.digest, believed=True)
            if entry is None or not self._will_do(entry, ticket):
                return None, "error"
        if entry is None or not self._will_do(entry, ticket):
            return None, "miss"
        return entry, "hit"

    async def _entry(self, key: CacheKey) -> Entry | None:
        """The entry in the store; raises ``StoreError``."""
        epoch = self.epoch
        payload = await self.store.read(COLLECTION, key.point_id)
        if payload is None:
            self.memory.discard(key.digest)
            return None
        try:
            entry = Entry.from_payload(key, payload)
        except DamagedEntryError as error:
            self.store.damaged(str(error))
            self.sweeper.doom(COLLECTION, key.point_id)
            return None
        if entry.expires_at <= self._now():
            return None
        if epoch == self.epoch:
            # What was read before the cache was cleared does not come back through here.
            self.memory.put(entry)
        return entry

    def _will_do(self, entry: Entry, ticket: Ticket) -> bool:
        return ticket.wish.permits(self._now() - entry.created_at)

    async def _find_near(self, call: Call, ticket: Ticket, in_flight: Callable[[str], bool]) -> Entry | None:
        """Look for a question that means the same."""
        started = self._clock()
        entry: Entry | None = None
        result: Result = "miss"
        try:
            entry = await self._near_entry(call, ticket)
        except StoreError:
            result = "error"
        if entry is not None:
            result = "hit"
        self._count(call.cache, "semantic", result, started)
        if entry is None and in_flight(ticket.key.digest):
            call.cache.shared, call.cache.kind, call.cache.result = True, "exact", "hit"
        if entry is not None:
            call.cache.age_s = max(0.0, self._now() - entry.created_at)
        return entry

    async def _near_entry(self, call: Call, ticket: Ticket) -> Entry | None:
        if self._semantic is None:
            return None
        tenant = ticket.key.tenant
        question = await self._semantic.question(tenant, call.model, call.body, call.deadline)
        ticket.question = question
        if question is None:
            return None
        for near in await self._semantic.nearest(tenant, question):
            entry = await self._entry_of(near)
            if entry is not None and self._will_do(entry, ticket):
                call.cache.similarity = near.similarity
                self._instruments.cache_similarity.record(near.similarity, {"kind": "semantic"})
                return entry
        return None

    async def _entry_of(self, near: Near) -> Entry | None:
        entry = self.memory.get(near.key.digest) or await self._entry(near.key)
        if entry is None:
            # Its answer is gone: too old, or crowded out.
            self.sweeper.doom(near.collection, near.point_id)
        return entry

    def assembler(self) -> Assembler:
        """What puts a streamed answer together, so that it can be kept."""
        return Assembler(self._settings.cache_max_entry_bytes)

    def keep(self, call: Call, ticket: Ticket, reply: Reply, origin: SpanContext) -> None:
        """Take the answer, if it is one to be stored; the store gets it afterwards."""
        if not ticket.wish.store or ticket.epoch != self.epoch:
            return
        ttl_s, max_bytes = self._settings.cache_ttl_s, self._settings.cache_max_entry_bytes
        entry = entry_of(ticket.key, call.model, reply, now=self._now(), ttl_s=ttl_s, max_bytes=max_bytes)
        if entry is None:
            return
        self.memory.put(entry)
        point = partial(_point, entry)
        self.writer.put(Write(COLLECTION, point, entry.size_bytes, entry.expires_at, origin))
        question, semantic = ticket.question, self._semantic
        if question is not None and semantic is not None:
            size_bytes = VECTOR_BYTES * len(question.vector)
            point = partial(semantic.point, entry, question)
            self.writer.put(Write(question.collection, point, size_bytes, entry.expires_at, origin))

    def _count(
        self,
        use: CacheUse,
        kind: Kind,
        result: Result,
        started: float | None = None,
        *,
        final: bool = True,
    ) -> None:
        self._instruments.cache_lookups.add(1, {"kind": kind, "result": result})
        if started is not None:
            self._instruments.cache_lookup_duration.record(self._clock() - started, {"kind": kind})
        if final:
            use.kind, use.result = kind, result
            self.results[result] += 1

    def _describe(self, span: Span, use: CacheUse) -> None:
        span.set_attributes({names.ATTR_CACHE_KIND: use.kind, names.ATTR_CACHE_RESULT: use.result})
        if use.shared:
            span.set_attribute(names.ATTR_CACHE_SHARED, True)  # noqa: FBT003 - an attribute's value
        if use.result == "hit":
            span.set_attribute(names.ATTR_CACHE_AGE, round(use.age_s, 3))
        if use.similarity is not None:
            span.set_attribute(names.ATTR_CACHE_SIMILARITY, round(use.similarity, 4))


def _point(entry: Entry) -> Point:
    return Point(entry.key.point_id, entry.as_payload())


PAGE = 1_000


@dataclass(frozen=True)
class CacheStats:
    """How the cache does; counts since this process's start, ``entries`` of the whole store.

    ``entries`` is None where the store did not say it in time.
    """

    entries: int | None
    hits: int
    misses: int
    bypassed: int
    errors: int
    memory_entries: int
    memory_bytes: int
    waiting: int
    dropped: int

    @property
    def ratio(self) -> float:
        """Hits as a share of the look-ups that could have been hits."""
        looked = self.hits + self.misses + self.errors
        return round(self.hits / looked, 4) if looked else 0.0


@dataclass(frozen=True)
class CacheFacts:
    """How the cache is set."""

    enabled: bool
    semantic: bool
    scope: Literal["user", "shared"]
    ttl_s: int
    max_entries: int

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """What the settings say."""
        return cls(
            settings.cache_enabled,
            settings.cache_enabled and settings.cache_semantic,
            settings.cache_scope,
            settings.cache_ttl_s,
            settings.cache_max_entries,
        )


class CacheAdmin:
    """Counts and clears.

    Args:
        cache: The cache.
        vectors: Finds what is to go.
        settings: How long a count may take.
    """

    def __init__(self, cache: ResponseCache, vectors: Vectors, settings: Settings) -> None:
        self._cache = cache
        self._vectors = vectors
        self._limit_s = settings.cache_timeout_s
        self._shared = settings.cache_scope == "shared"

    async def stats(self) -> CacheStats:
        """How the cache does now; what has just been answered is counted, if the store takes it in time."""
        cache = self._cache
        await cache.writer.idle(self._limit_s)
        entries: int | None = None
        with suppress(StoreError):
            entries = await cache.store.count(COLLECTION)
        return CacheStats(
            entries=entries,
            hits=cache.results["hit"],
            misses=cache.results["miss"],
            bypassed=cache.results["bypass"],
            errors=cache.results["error"],
            memory_entries=len(cache.memory),
            memory_bytes=cache.memory.size_bytes,
            waiting=cache.writer.waiting,
            dropped=cache.writer.dropped,
        )

    async def clear(self, *, user: str | None = None, model: str | None = None) -> int:
        """Take out everything, or everything of this user and this model; how many answers that were.

        Raises:
            ValidationError: No answer is one user's, because all of them share theirs.
            UpstreamError: The store did not do it, or not all of it.
        """
        cache = self._cache
        if user is not None and self._shared:
            raise ValidationError("The cache is shared (CACHE_SCOPE): no answer in it is one user's.")
        # Calls under way do not bring back what is being cleared.
        cache.epoch += 1
        equal: dict[str, str] = {}
        if user is not None:
            equal["tenant"] = cache.tenant(user)
        if model is not None:
            equal["model"] = model
        cache.memory.clear(tenant=equal.get("tenant"), model=model)
        # What waits is written, and taken out with the rest; what the store does not take is forgotten.
        await cache.writer.idle(self._limit_s)
        try:
            async with cache.writer.paused():
                cleared = await self._clear_store(equal)
        except StoreError as error:
            raise UpstreamError(
                f"The cache's store did not do it ({error.reason}). Try again.", label=error.reason
            ) from None
        # Look-ups that read the store while it was being cleared do not bring back what they found.
        cache.epoch += 1
        cache.memory.clear(tenant=equal.get("tenant"), model=model)
        return cleared

    async def _clear_store(self, equal: dict[str, str]) -> int:
        store = self._cache.store
        cleared = 0
        for collection in await store.collections():
            if equal:
                gone = await self._clear_some(collection, equal)
            else:
                gone = await store.count(collection)
                await store.drop(collection)
                if collection == COLLECTION:
                    # Other processes are not to find it missing.
                    await store.prepare(COLLECTION)
            cleared += gone if collection == COLLECTION else 0
        return cleared

    async def _clear_some(self, collection: str, equal: dict[str, str]) -> int:
        gone = 0
        while True:
            ids = await self._cache.store.ids(collection, self._vectors.having(collection, equal, PAGE))
            await self._cache.store.delete(collection, ids)
            gone += len(ids)
            if len(ids) < PAGE:
                return gone


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
