"""Clearing one user's answers, or one model's, leaves those of others alone, however slow the store is."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import pytest
from opentelemetry.trace import INVALID_SPAN_CONTEXT

from service.cache.control import CacheControl
from service.cache.embedded import EmbeddedStore
from service.cache.response_cache import LEFT_S, CacheAdmin, Clearings, Lookup, ResponseCache
from service.cache.store import Point
from service.shared.leases import ANSWER_S
from service.upstream.messages import Completion, LlmRequest, Reply
from service.utils.deadline import Deadline
from tests.fakes.clock import FakeClock
from tests.harness import make_settings
from tests.unit.test_cache_parts import Rig, in_loop

CONTENT = b'{"choices": [{"finish_reason": "stop", "message": {"content": "Said."}}]}'
REPLY = Reply(CONTENT, Completion("Said.", "demo", finish_reasons=("stop",)))


class SlowStore(EmbeddedStore):
    """A store in memory that writes nothing until it may."""

    def __init__(self) -> None:
        super().__init__(":memory:")
        self.writing = asyncio.Event()
        self.may_write = asyncio.Event()

    async def write(self, collection: str, points: Sequence[Point]) -> None:
        self.writing.set()
        await self.may_write.wait()
        await super().write(collection, points)


class Clearing:
    """A cache on a slow store, and its administration."""

    def __init__(self, store: SlowStore) -> None:
        settings = make_settings(cache_enabled=True, cache_timeout_s=0.01)
        self.store = store
        self.rig = Rig(store)
        self.cache = ResponseCache(self.rig.store, settings, self.rig.telemetry)
        self.admin = CacheAdmin(self.cache, settings)

    async def call(self, user: str, model: str, prompt: str) -> Lookup:
        """Begin a call: look for its answer."""
        body = {"model": model, "messages": [{"role": "user", "content": prompt}]}
        request = LlmRequest("chat", model, body, b"")
        return await self.cache.lookup(
            request, user, CacheControl(), Deadline.after(5), lambda _digest: False
        )

    def answered(self, lookup: Lookup, model: str) -> None:
        """End a call: store its answer."""
        self.cache.store(lookup, REPLY, model, INVALID_SPAN_CONTEXT)

    async def clear(self, user: str | None, model: str | None) -> None:
        """Clear while the store is slow; it becomes fast when what waits has been dealt with."""
        clearing = asyncio.create_task(self.admin.clear(user=user, model=model))
        async with asyncio.timeout(5):
            while not self.rig.outcomes().get("cleared"):  # noqa: ASYNC110 - a metric has no event
                await asyncio.sleep(0.001)
        self.store.may_write.set()
        await clearing
        await self.cache.writer.wait_until_empty(5)

    async def stored(self) -> set[tuple[str, str]]:
        """Whose answers are stored, by which models; memory does not count."""
        self.cache.memory.clear()
        kept: set[tuple[str, str]] = set()
        for user in USERS:
            for model in MODELS:
                for prompt in ("first", "second", "third"):
                    if (await self.call(user, model, prompt)).result == "hit":
                        kept.add((user, model))
        return kept


USERS, MODELS = ("alice", "bob"), ("demo", "other")


@asynccontextmanager
async def clearing_rig() -> AsyncIterator[Clearing]:
    store = SlowStore()
    await store.open()
    made = Clearing(store)
    writing = asyncio.create_task(made.cache.writer.run())
    try:
        yield made
    finally:
        writing.cancel()
        await store.close()
        made.rig.telemetry.shutdown(1)


@pytest.mark.parametrize(
    ("user", "model"), [("alice", None), (None, "demo"), ("alice", "demo"), (None, None)]
)
@in_loop
async def test_only_what_is_cleared_is_forgotten(user: str | None, model: str | None) -> None:
    async with clearing_rig() as made:
        calls = [(whose, which) for whose in USERS for which in MODELS]
        made.answered(await made.call("bob", "other", "first"), "other")
        await made.store.writing.wait()
        for whose, which in calls:
            made.answered(await made.call(whose, which, "second"), which)
        under_way = [(await made.call(whose, which, "third"), which) for whose, which in calls]
        await made.clear(user, model)
        cleared = {call for call in calls if user in {None, call[0]} and model in {None, call[1]}}

        outcomes = made.rig.outcomes()
        # The one that was being written is not counted as forgotten: it was written, and then removed.
        assert outcomes["cleared"] == len(cleared) + (user is None and model is None)
        assert outcomes.get("dropped", 0) == 0
        assert await made.stored() == set(calls) - cleared
        for lookup, which in under_way:
            made.answered(lookup, which)
        await made.cache.writer.wait_until_empty(5)
        assert await made.stored() == set(calls) - cleared
        assert made.cache.writer.waiting_bytes == 0


def test_a_call_older_than_all_remembered_clearings_counts_as_affected() -> None:
    clearings = Clearings()
    assert not clearings.affected("alice", "demo", since=0)
    clearings.add("bob", None)
    assert not clearings.affected("alice", "demo", since=0)
    clearings.add("alice", None)
    assert clearings.affected("alice", "demo", since=0)
    assert not clearings.affected("alice", "demo", since=2)
    for _ in range(1_001):
        clearings.add("bob", None)
    assert clearings.affected("carol", "demo", since=1)
    assert not clearings.affected("carol", "demo", since=10)


async def other(store: EmbeddedStore, clock: FakeClock) -> tuple[ResponseCache, Lookup]:
    """The cache of another process, and a call that is equal to the first one's."""
    made = Rig(store)
    settings = make_settings(cache_enabled=True)
    cache = ResponseCache(made.store, settings, made.telemetry, now=clock, clock=clock)
    body = {"model": "demo", "messages": [{"role": "user", "content": "x"}]}
    request = LlmRequest("chat", "demo", body, b"")
    lookup = await cache.lookup(
        request, "anna", CacheControl(), Deadline.after(5, clock=clock), lambda _digest: False
    )
    return cache, lookup


@dataclass(frozen=True)
class Left:
    """An answer that another process has left, whether it was cleared since, and whether it may be taken."""

    cleared: bool
    waited_s: float
    followed: bool
    taken: bool


@pytest.mark.parametrize(
    "left",
    [
        Left(cleared=False, waited_s=0.0, followed=False, taken=True),
        Left(cleared=True, waited_s=0.0, followed=False, taken=False),
        Left(cleared=True, waited_s=LEFT_S - 0.1, followed=False, taken=False),
        Left(cleared=True, waited_s=LEFT_S, followed=False, taken=True),
        Left(cleared=True, waited_s=0.0, followed=True, taken=True),
    ],
)
@in_loop
async def test_an_answer_that_was_left_before_a_clearing_is_not_taken_after_it(left: Left) -> None:
    clock = FakeClock(1_800_000_000.0)
    store = EmbeddedStore(":memory:")
    await store.open()
    cache, lookup = await other(store, clock)
    entry = cache.store(lookup, REPLY, "demo", INVALID_SPAN_CONTEXT)
    assert entry is not None
    assert lookup.slot is not None
    assert ANSWER_S < LEFT_S
    if left.cleared:
        cache.forget(None, None)
    clock.advance(left.waited_s)
    found = cache.accept(lookup.slot, entry.as_json(), followed=left.followed)
    assert (found is not None) is left.taken
    # What is older than a clearing never comes into memory.
    assert len(cache.memory) == (0 if left.cleared else 1)
    await store.close()


@pytest.mark.parametrize(
    "answer",
    [b"", b"{", b"[]", b"null", b"{}", b"[" * 100_000, b'{"key": "x", "tenant": "y"}', b"\xff\xfe"],
)
@in_loop
async def test_an_answer_of_another_process_that_is_none_is_not_taken(answer: bytes) -> None:
    store = EmbeddedStore(":memory:")
    await store.open()
    cache, lookup = await other(store, FakeClock(1_800_000_000.0))
    assert lookup.slot is not None
    assert cache.accept(lookup.slot, answer, followed=True) is None
    await store.close()


@in_loop
async def test_an_answer_to_another_call_or_one_that_is_too_old_is_not_taken() -> None:
    clock = FakeClock(1_800_000_000.0)
    store = EmbeddedStore(":memory:")
    await store.open()
    cache, lookup = await other(store, clock)
    assert lookup.slot is not None
    entry = cache.store(lookup, REPLY, "demo", INVALID_SPAN_CONTEXT)
    assert entry is not None
    of_another = replace(lookup.slot, key=replace(lookup.slot.key, tenant="another"))
    assert cache.accept(of_another, entry.as_json(), followed=True) is None
    clock.advance(3)
    recent = replace(lookup.slot, control=CacheControl(max_age_s=2))
    assert cache.accept(recent, entry.as_json(), followed=False) is None
    assert cache.accept(recent, entry.as_json(), followed=True) == entry
    clock.advance(make_settings().cache_ttl_s)
    assert cache.accept(lookup.slot, entry.as_json(), followed=True) is None
    await store.close()
