"""Answers stored earlier: looking them up, storing new ones, and administering the cache.

``open_cache`` puts the cache together. The use case sees it as an ``AnswerCache``: ``ResponseCache`` and
``SemanticCache`` where it is on, ``NoCache`` where it is off.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, Literal, Protocol, Self

from opentelemetry.trace import Span, SpanContext

from service.cache.assembly import Assembler
from service.cache.control import CacheControl, Kind, Result
from service.cache.entries import DamagedEntryError, Entry, EntryMemory, is_complete
from service.cache.keys import LARGE_REQUEST_BYTES, CacheKey, key_of, large_key_of, tenant_of
from service.cache.semantic import Question, SemanticIndex, question_point
from service.cache.store import (
    COLLECTION,
    Guard,
    GuardedStore,
    StoreError,
    VectorStore,
    equal_to,
)
from service.cache.sweeper import CacheSweeper
from service.cache.writer import CacheWriter, Write
from service.config.settings import Settings
from service.errors import Fault, UpstreamError, ValidationError
from service.telemetry import names
from service.telemetry.providers import SCOPE, Telemetry
from service.upstream.client import LlmClient
from service.upstream.messages import Completion, LlmRequest, Reply
from service.upstream.operations import OPERATIONS
from service.utils.deadline import Deadline

FRESH_S = 10.0
"""How long an entry in memory is returned without asking a server: other processes may clear the cache."""

VECTOR_BYTES = 8

LEFT_S = 6.0
"""For how long after a clearing no answer is taken that another process has left: it is left for less."""

MAX_CLEARINGS = 1_000
"""Clearings that are remembered; a call that is older than all of them is taken to be affected."""


@dataclass(frozen=True, slots=True)
class Slot:
    """The place of one call's answer in the cache.

    Args:
        key: The answer's key.
        control: The request's ``Cache-Control``.
        epoch: How often the cache had been cleared, in part or whole, when the call came.
        question: The call's question with its vector; None where it was not compared by meaning.
    """

    key: CacheKey
    control: CacheControl
    epoch: int
    question: Question | None = None


@dataclass(frozen=True, slots=True)
class Lookup:
    """The outcome of one look-up.

    Args:
        result: How the look-up ended.
        kind: Which look-up gave this result: by key, or by meaning.
        entry: The stored answer; None without a hit, and where the answer is that of a call under way.
        shared: Whether an equal call is under way, whose answer this caller can share; ``result`` is a hit.
        age_s: Age of the stored answer in seconds.
        similarity: Cosine similarity of the two questions; of a hit by meaning only.
        lookup_s: Seconds that the look-up took.
        slot: Where the answer is stored; None where it is neither looked up nor stored.
    """

    result: Result = "bypass"
    kind: Kind = "exact"
    entry: Entry | None = None
    shared: bool = False
    age_s: float = 0.0
    similarity: float | None = None
    lookup_s: float = 0.0
    slot: Slot | None = None

    @property
    def seen(self) -> Literal["hit", "miss", "bypass"]:
        """The result as callers and records see it: an error of the cache is a miss."""
        return "miss" if self.result == "error" else self.result


class Clearings:
    """Remembers what was cleared, so that calls under way at that time do not store it again.

    Args:
        clock: Monotonic, in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.number = 0
        self.last_s = -math.inf
        """When the last one was noted."""
        self._clock = clock
        self._last: deque[tuple[str | None, str | None]] = deque(maxlen=MAX_CLEARINGS)

    def add(self, tenant: str | None, model: str | None) -> None:
        """Note that the answers of this tenant and this model were cleared; None stands for every one."""
        self.number += 1
        self.last_s = self._clock()
        self._last.append((tenant, model))

    def affected(self, tenant: str, model: str, *, since: int) -> bool:
        """Whether this tenant's answers of this model were cleared after so many clearings."""
        missed = self.number - since
        if missed > len(self._last):
            return True
        later = islice(reversed(self._last), missed)
        return any(whose in {None, tenant} and which in {None, model} for whose, which in later)


class AnswerCache(Protocol):
    """What the use case needs of the cache."""

    async def lookup(
        self,
        request: LlmRequest,
        user: str,
        control: CacheControl,
        deadline: Deadline,
        in_flight: Callable[[str], bool],
    ) -> Lookup:
        """Look for a stored answer, or for an equal call under way; raises nothing but ``CancelledError``.

        An answer in this process's memory is found without suspending.

        Args:
            request: The call.
            user: Who asks.
            control: The request's ``Cache-Control``.
            deadline: When the call must be over.
            in_flight: Whether a call with this digest is under way that this one can share.
        """
        ...

    def assembler(self, lookup: Lookup) -> Assembler:
        """What puts a streamed answer together so that it can be stored."""
        ...

    def store(self, lookup: Lookup, reply: Reply, model: str, origin: SpanContext) -> Entry | None:
        """Store the answer if the look-up and the answer allow it; does not wait for the store.

        Args:
            lookup: The call's look-up.
            reply: The answer.
            model: The model that was asked.
            origin: The call's span, linked from the span of the write.

        Returns:
            What is stored; None where nothing is.
        """
        ...

    def accept(self, slot: Slot, answer: bytes, *, followed: bool) -> Entry | None:
        """The answer that another process made, if it is an answer to this call and still valid.

        Args:
            slot: The place of the call's answer.
            answer: The answer, as ``Entry.as_json`` has it.
            followed: Whether it was made while the call waited for it, so that it is new whatever its age.
        """
        ...

    def store_streamed(
        self, lookup: Lookup, assembler: Assembler, completion: Completion, model: str, origin: SpanContext
    ) -> None:
        """Store a streamed answer, as ``store`` does, if it could be put together.

        Args:
            lookup: The call's look-up.
            assembler: What put the answer together.
            completion: What the stream knows of the answer.
            model: The model that was asked.
            origin: The call's span, linked from the span of the write.
        """
        ...


class NoCache:
    """The cache where it is off: finds nothing, stores nothing, and leaves no telemetry."""

    async def lookup(
        self,
        request: LlmRequest,  # noqa: ARG002 - as AnswerCache has it
        user: str,  # noqa: ARG002 - as AnswerCache has it
        control: CacheControl,  # noqa: ARG002 - as AnswerCache has it
        deadline: Deadline,  # noqa: ARG002 - as AnswerCache has it
        in_flight: Callable[[str], bool],  # noqa: ARG002 - as AnswerCache has it
    ) -> Lookup:
        """Bypass the cache."""
        return Lookup()

    def assembler(self, lookup: Lookup) -> Assembler:  # noqa: ARG002 - as AnswerCache has it
        """An assembler that takes nothing."""
        return Assembler(0)

    def store(self, lookup: Lookup, reply: Reply, model: str, origin: SpanContext) -> None:
        """Store nothing."""

    def accept(self, slot: Slot, answer: bytes, *, followed: bool) -> None:
        """Nothing is shared."""

    def store_streamed(
        self, lookup: Lookup, assembler: Assembler, completion: Completion, model: str, origin: SpanContext
    ) -> None:
        """Store nothing."""


class ResponseCache:
    """Finds stored answers to equal questions, and takes new answers.

    Args:
        store: Where entries are stored.
        settings: Which answers are cached, for how long, whose they are and how large they may be.
        telemetry: Where spans and counts go.
        now: Unix time in seconds.
        clock: For durations, in seconds.
    """

    def __init__(
        self,
        store: GuardedStore,
        settings: Settings,
        telemetry: Telemetry,
        *,
        now: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        instruments, tracer = telemetry.instruments, telemetry.tracer_provider.get_tracer(SCOPE)
        self.backend = store
        self.sweeper = CacheSweeper(store, settings.cache_max_entries, tracer)
        self.writer = CacheWriter(
            store, telemetry, settings.cache_queue_bytes, on_written=self.sweeper.count_written
        )
        self.memory = EntryMemory(settings.cache_memory_bytes, FRESH_S if store.shared else None)
        self.clearings = Clearings(clock)
        self.results: dict[Result, int] = {"hit": 0, "miss": 0, "bypass": 0, "error": 0}
        self._settings = settings
        self._instruments = instruments
        self._tracer = tracer
        self._now = now
        self._clock = clock
        # Two deployments may share one Qdrant, and have users and models of the same names.
        self._realm = f"{settings.environment} {settings.litellm_url}"

    def tenant(self, user: str) -> str:
        """The tenant whose answers this user gets."""
        return tenant_of(None if self._settings.cache_scope == "shared" else user, self._realm)

    def forget(self, tenant: str | None, model: str | None) -> None:
        """Forget the answers in memory; calls under way do not store theirs any more."""
        self.clearings.add(tenant, model)
        self.memory.clear(tenant=tenant, model=model)

    async def lookup(
        self,
        request: LlmRequest,
        user: str,
        control: CacheControl,
        deadline: Deadline,
        in_flight: Callable[[str], bool],
    ) -> Lookup:
        """Look in memory, then in the store, then by meaning where that is on; as ``AnswerCache`` says."""
        if not OPERATIONS[request.operation].cacheable:
            # Others are not looked up: they count as no look-up, not as a bypassed one.
            return Lookup()
        slot = await self._slot(request, user, control)
        if slot is None or not control.read:
            self._instruments.cache_lookups.add(1, {"kind": "exact", "result": "bypass"})
            self.results["bypass"] += 1
            return Lookup(slot=slot)
        key = slot.key
        started_s = self._clock()
        with self._tracer.start_as_current_span(
            names.SPAN_CACHE_LOOKUP, record_exception=False, set_status_on_exception=False
        ) as span:
            failed = False
            entry = self.memory.get(key.digest)
            if entry is not None and not control.permits(self._now() - entry.created_at):
                entry = None
            if entry is None and not in_flight(key.digest):
                try:
                    entry = self._accept(key, await self.backend.read(COLLECTION, key.point_id), slot.epoch)
                except StoreError:
                    failed = True
                    # An entry that the store cannot confirm is as good as when it was stored.
                    entry = self.memory.get(key.digest, allow_stale=True)
                if entry is not None and not control.permits(self._now() - entry.created_at):
                    entry = None
            shared = entry is None and in_flight(key.digest)
            result: Result = "hit" if shared or entry is not None else "error" if failed else "miss"
            lookup_s = self._clock() - started_s
            self._instruments.cache_lookups.add(1, {"kind": "exact", "result": result})
            self._instruments.cache_lookup_duration.record(lookup_s, {"kind": "exact"})
            age_s = 0.0 if entry is None else max(0.0, self._now() - entry.created_at)
            found = Lookup(result, "exact", entry, shared, age_s, None, lookup_s, slot)
            if result == "miss" and len(request.content) <= LARGE_REQUEST_BYTES:
                found = await self._lookup_similar(found, slot, request, deadline, in_flight)
            else:
                self.results[result] += 1
            _describe(span, found)
        return found

    async def _slot(self, request: LlmRequest, user: str, control: CacheControl) -> Slot | None:
        """Where the answer is stored; None where it is not, or where the request is nested too deeply."""
        if not control.read and not control.store:
            return None
        tenant, number = self.tenant(user), self.clearings.number
        if len(request.content) > LARGE_REQUEST_BYTES:
            key = await asyncio.get_running_loop().run_in_executor(
                None, large_key_of, tenant, request.model, request.content, request.headers
            )
            return Slot(key, control, number)
        try:
            key = key_of(tenant, request.model, request.body, request.headers)
        except RecursionError:
            return None
        return Slot(key, control, number)

    def _accept(self, key: CacheKey, payload: Mapping[str, Any] | None, epoch: int) -> Entry | None:
        """The entry in a payload that the store returned; None where it is missing, damaged or expired."""
        if payload is None:
            self.memory.discard(key.digest)
            return None
        try:
            entry = Entry.from_payload(key, payload)
        except DamagedEntryError as error:
            self.backend.note_damaged(str(error))
            self.sweeper.mark_for_removal(COLLECTION, key.point_id)
            return None
        if entry.expires_at <= self._now():
            return None
        # An entry read before the cache was cleared must not come back into memory.
        if not self.clearings.affected(key.tenant, entry.model, since=epoch):
            self.memory.put(entry)
        return entry

    async def _lookup_similar(
        self,
        missed: Lookup,
        slot: Slot,  # noqa: ARG002 - as SemanticCache has it
        request: LlmRequest,  # noqa: ARG002 - as SemanticCache has it
        deadline: Deadline,  # noqa: ARG002 - as SemanticCache has it
        in_flight: Callable[[str], bool],  # noqa: ARG002 - as SemanticCache has it
    ) -> Lookup:
        """The outcome where no equal question is stored; here, that of the exact look-up."""
        self.results["miss"] += 1
        return missed

    def assembler(self, lookup: Lookup) -> Assembler:
        """What puts a streamed answer together; it takes nothing where the answer is not to be stored."""
        wanted = lookup.slot is not None and lookup.slot.control.store
        return Assembler(self._settings.cache_max_entry_bytes if wanted else 0)

    def store(self, lookup: Lookup, reply: Reply, model: str, origin: SpanContext) -> Entry | None:
        """Put the answer into memory and into the writer's queue, if it may be stored."""
        if lookup.slot is None or not lookup.slot.control.store:
            return None
        return self._store(lookup.slot, reply, b"", model, origin)

    def accept(self, slot: Slot, answer: bytes, *, followed: bool) -> Entry | None:
        """The answer that another process made, which goes into memory; None where it is of no use."""
        if not followed and self._clock() < self.clearings.last_s + LEFT_S:
            # It may be older than the clearing.
            return None
        try:
            entry = Entry.from_json(slot.key, answer)
        except DamagedEntryError:
            return None
        now = self._now()
        if entry.expires_at <= now or not (followed or slot.control.permits(now - entry.created_at)):
            return None
        if not self.clearings.affected(slot.key.tenant, entry.model, since=slot.epoch):
            self.memory.put(entry)
        return entry

    def store_streamed(
        self, lookup: Lookup, assembler: Assembler, completion: Completion, model: str, origin: SpanContext
    ) -> None:
        """As ``store`` does, if the answer could be put together."""
        if lookup.slot is None or not lookup.slot.control.store:
            return
        assembled = assembler.answer(completion)
        if assembled is None:
            self._instruments.cache_writes.add(1, {"outcome": "skipped"})
        else:
            reply, layout = assembled
            self._store(lookup.slot, reply, layout, model, origin)

    def _store(
        self, slot: Slot, reply: Reply, layout: bytes, model: str, origin: SpanContext
    ) -> Entry | None:
        settings, tenant = self._settings, slot.key.tenant
        if self.clearings.affected(tenant, model, since=slot.epoch):
            return None
        size_bytes = len(reply.content) + len(layout)
        if size_bytes > settings.cache_max_entry_bytes or not is_complete(reply):
            self._instruments.cache_writes.add(1, {"outcome": "skipped"})
            return None
        now = self._now()
        expires_at = now + settings.cache_ttl_s
        entry = Entry(slot.key, model, now, expires_at, reply.content, reply.completion, layout)
        self.memory.put(entry)
        self.writer.put(
            Write(COLLECTION, entry.point, entry.size_bytes, entry.expires_at, origin, tenant, model)
        )
        if slot.question is not None:
            size_bytes = VECTOR_BYTES * len(slot.question.vector)
            point = partial(question_point, entry, slot.question)
            self.writer.put(
                Write(slot.question.collection, point, size_bytes, entry.expires_at, origin, tenant, model)
            )
        return entry


class SemanticCache(ResponseCache):
    """A ``ResponseCache`` that also finds answers to questions that mean the same.

    Args:
        index: Finds stored questions by their meaning.
        store: Where entries are stored.
        settings: As ``ResponseCache`` has them.
        telemetry: Where spans and counts go.
    """

    def __init__(
        self, index: SemanticIndex, store: GuardedStore, settings: Settings, telemetry: Telemetry
    ) -> None:
        super().__init__(store, settings, telemetry)
        self._index = index

    async def _lookup_similar(
        self,
        missed: Lookup,
        slot: Slot,
        request: LlmRequest,
        deadline: Deadline,
        in_flight: Callable[[str], bool],
    ) -> Lookup:
        started_s = self._clock()
        found: tuple[Entry | None, float | None] = (None, None)
        result: Result = "miss"
        try:
            question = await self._index.question(slot.key.tenant, request.model, request.body, deadline)
            if question is not None:
                slot = replace(slot, question=question)
                found = await self._nearest(slot, question)
        except (StoreError, RecursionError):
            result = "error"
        entry, similarity = found
        if entry is not None:
            result = "hit"
        elapsed_s = self._clock() - started_s
        self._instruments.cache_lookups.add(1, {"kind": "semantic", "result": result})
        self._instruments.cache_lookup_duration.record(elapsed_s, {"kind": "semantic"})
        self.results[result] += 1
        lookup_s = missed.lookup_s + elapsed_s
        if entry is None and in_flight(slot.key.digest):
            return Lookup("hit", "exact", shared=True, lookup_s=lookup_s, slot=slot)
        age_s = 0.0 if entry is None else max(0.0, self._now() - entry.created_at)
        return Lookup(
            result, "semantic", entry, age_s=age_s, similarity=similarity, lookup_s=lookup_s, slot=slot
        )

    async def _nearest(self, slot: Slot, question: Question) -> tuple[Entry | None, float | None]:
        """The answer to the most similar question that still has one; raises ``StoreError``."""
        for match in await self._index.nearest(slot.key.tenant, question):
            entry = self.memory.get(match.key.digest)
            if entry is None:
                epoch = self.clearings.number
                payload = await self.backend.read(COLLECTION, match.key.point_id)
                entry = self._accept(match.key, payload, epoch)
            if entry is None:
                # The question has outlived its answer, which expired or was evicted.
                self.sweeper.mark_for_removal(match.collection, match.point_id)
            elif slot.control.permits(self._now() - entry.created_at):
                self._instruments.cache_similarity.record(match.similarity, {"kind": "semantic"})
                return entry, match.similarity
        return None, None


def _describe(span: Span, lookup: Lookup) -> None:
    described: dict[str, str | bool | float] = {
        names.ATTR_CACHE_KIND: lookup.kind,
        names.ATTR_CACHE_RESULT: lookup.result,
    }
    if lookup.shared:
        described[names.ATTR_CACHE_SHARED] = True
    if lookup.result == "hit":
        described[names.ATTR_CACHE_AGE] = round(lookup.age_s, 3)
    if lookup.similarity is not None:
        described[names.ATTR_CACHE_SIMILARITY] = round(lookup.similarity, 4)
    span.set_attributes(described)


PAGE = 1_000


@dataclass(frozen=True)
class CacheStats:
    """How the cache is doing: counts since the start of this process, and the size of the whole store.

    ``entries`` is None where the store did not answer in time.
    """

    entries: int | None = 0
    hits: int = 0
    misses: int = 0
    bypassed: int = 0
    errors: int = 0
    memory_entries: int = 0
    memory_bytes: int = 0
    waiting: int = 0
    dropped: int = 0

    @property
    def ratio(self) -> float:
        """Hits as a share of the look-ups that could have been hits."""
        looked = self.hits + self.misses + self.errors
        return round(self.hits / looked, 4) if looked else 0.0


@dataclass(frozen=True)
class CacheFacts:
    """How the cache is configured."""

    enabled: bool
    semantic: bool
    scope: Literal["user", "shared"]
    ttl_s: int
    max_entries: int

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """The facts in the settings."""
        return cls(
            settings.cache_enabled,
            settings.cache_enabled and settings.cache_semantic,
            settings.cache_scope,
            settings.cache_ttl_s,
            settings.cache_max_entries,
        )


Cleared = Callable[[str | None, str | None], None]
"""Is told of the tenant and the model whose answers are cleared; None stands for every one."""


class NoCacheAdmin:
    """Administers the cache where it is off: there is nothing to count and nothing to clear.

    Args:
        settings: How the cache is configured.
    """

    def __init__(self, settings: Settings) -> None:
        self.facts = CacheFacts.of(settings)
        self.on_cleared: Cleared = lambda _tenant, _model: None

    def forget(self, tenant: str | None, model: str | None) -> None:
        """There is nothing to forget."""

    async def stats(self) -> CacheStats:
        """No entries, no look-ups."""
        return CacheStats()

    async def clear(self, *, user: str | None = None, model: str | None = None) -> int:  # noqa: ARG002 - as CacheAdmin has it
        """Clear nothing."""
        return 0


class CacheAdmin:
    """Counts and clears the cache's entries.

    Args:
        cache: The cache.
        settings: How the cache is configured, and how long a count may take.
    """

    def __init__(self, cache: ResponseCache, settings: Settings) -> None:
        self.facts = CacheFacts.of(settings)
        self._cache = cache
        self._timeout_s = settings.cache_timeout_s
        self._shared = settings.cache_scope == "shared"
        self.on_cleared: Cleared = lambda _tenant, _model: None
        """Called when answers are about to be cleared, and again when they are."""

    async def stats(self) -> CacheStats:
        """Count; answers that have just been given are included if they can be written in time."""
        cache = self._cache
        await cache.writer.wait_until_empty(self._timeout_s)
        entries: int | None = None
        with suppress(StoreError):
            entries = await cache.backend.count(COLLECTION)
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
        """Remove all answers, or those of this user and this model; how many there were.

        Raises:
            ValidationError: A user was named, and users share their answers.
            UpstreamError: The store failed; some answers may be left.
        """
        cache = self._cache
        if user is not None and self._shared:
            raise ValidationError("The cache is shared (CACHE_SCOPE): no answer in it is one user's.")
        tenant = None if user is None else cache.tenant(user)
        values = {"tenant": tenant, "model": model}
        equal = {name: value for name, value in values.items() if value is not None}
        cache.forget(tenant, model)
        self.on_cleared(tenant, model)
        # Waiting entries are written first and removed with the rest; what cannot be written is discarded.
        await cache.writer.wait_until_empty(self._timeout_s)
        try:
            async with cache.writer.paused(tenant=tenant, model=model):
                cleared = await self._clear_store(equal)
        except StoreError as error:
            raise UpstreamError(
                f"The cache's store did not do it ({error.reason}). Try again.",
                label=error.reason,
                fault=Fault.CACHE,
            ) from None
        # Look-ups that read the store while it was being cleared do not put what they read into memory.
        cache.forget(tenant, model)
        self.on_cleared(tenant, model)
        return cleared

    def forget(self, tenant: str | None, model: str | None) -> None:
        """Forget what another process clears: what is in memory, and what still waits to be written."""
        self._cache.forget(tenant, model)
        self._cache.writer.discard(tenant, model)

    async def _clear_store(self, equal: dict[str, str]) -> int:
        store = self._cache.backend
        cleared = 0
        for collection in await store.collections():
            if equal:
                removed = await self._clear_matching(collection, equal)
            else:
                removed = await store.count(collection)
                await store.drop(collection)
                if collection == COLLECTION:
                    # Made again at once, so that other processes do not find it missing.
                    await store.prepare(COLLECTION)
            cleared += removed if collection == COLLECTION else 0
        return cleared

    async def _clear_matching(self, collection: str, equal: dict[str, str]) -> int:
        store = self._cache.backend
        removed = 0
        while True:
            ids = await store.ids(collection, PAGE, equal_to(equal))
            await store.delete(collection, ids)
            removed += len(ids)
            if len(ids) < PAGE:
                return removed


BREAKER_FAILURES = 3
BREAKER_S = 10.0
"""A store that fails is asked again after this time. In between it costs at most three slow look-ups, of
``CACHE_TIMEOUT_S`` each."""

FLUSH_TIMEOUT_S = 0.8


def open_store(settings: Settings) -> AbstractAsyncContextManager[VectorStore]:
    """Open the store that the settings name, a Qdrant server or the embedded one; leaving closes it."""
    # Only one of them is imported: the two need different halves of Qdrant's client.
    if settings.qdrant_url:
        from service.cache.qdrant_server import open_server  # noqa: PLC0415 - as said

        return open_server(settings)
    from service.cache.embedded import open_embedded  # noqa: PLC0415 - as said

    return open_embedded(settings.qdrant_path)


@dataclass(frozen=True)
class Cache:
    """The cache as the service uses it.

    Args:
        answers: Looks up and stores answers.
        admin: Counts and clears them.
        background: Coroutine functions that run until the process stops.
    """

    answers: AnswerCache
    admin: CacheAdmin | NoCacheAdmin
    background: tuple[Callable[[], Coroutine[Any, Any, None]], ...] = ()


@asynccontextmanager
async def open_cache(
    settings: Settings, telemetry: Telemetry, llm: LlmClient, store: VectorStore, guard: Guard
) -> AsyncIterator[Cache]:
    """Build the cache that the settings ask for; leaving the block writes the entries that still wait.

    Args:
        settings: Whether the cache is on, and how it is configured.
        telemetry: Where spans and counts go.
        llm: Makes the vectors of questions.
        store: Where entries are stored, made by ``open_store``.
        guard: What happens when the store fails; its breakers have ``BREAKER_FAILURES`` and ``BREAKER_S``.
    """
    if not settings.cache_enabled:
        yield Cache(NoCache(), NoCacheAdmin(settings))
        return
    tracer = telemetry.tracer_provider.get_tracer(SCOPE)
    backend = GuardedStore(store, guard, tracer, settings.cache_timeout_s)
    if settings.cache_semantic:
        index = SemanticIndex(llm, backend, settings, guard.breaker("embeddings"))
        cache: ResponseCache = SemanticCache(index, backend, settings, telemetry)
    else:
        cache = ResponseCache(backend, settings, telemetry)
    try:
        yield Cache(cache, CacheAdmin(cache, settings), (cache.writer.run, cache.sweeper.run))
    finally:
        await cache.writer.flush(FLUSH_TIMEOUT_S)
