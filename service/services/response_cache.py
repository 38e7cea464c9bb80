"""The cache of answers: exact look-up, then by meaning where that is switched on; it never fails a call."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

from opentelemetry.trace import Span, SpanContext, Tracer

from service.clients.llm_answers import Reply
from service.clients.vectors import COLLECTION, StoreError
from service.clients.vectors_points import Point
from service.config.settings import Settings
from service.services.cache_entry import DamagedEntryError, Entry, entry_of
from service.services.cache_key import CacheKey, key_of, tenant_of
from service.services.cache_memory import EntryMemory
from service.services.cache_semantic import Near, Question, SemanticIndex
from service.services.cache_store import CacheStore
from service.services.cache_stream import Assembler
from service.services.cache_sweeper import CacheSweeper
from service.services.cache_use import CacheUse, CacheWish, Kind, Result
from service.services.cache_writer import CacheWriter, Write
from service.services.call_report import Call
from service.telemetry import names
from service.telemetry.instruments import Instruments

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
