"""Clearing one user's answers, or one model's, leaves those of others alone, however slow the store is."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
from opentelemetry.trace import INVALID_SPAN_CONTEXT

from service.cache.control import CacheControl
from service.cache.embedded import EmbeddedStore
from service.cache.response_cache import CacheAdmin, Clearings, Lookup, ResponseCache
from service.cache.store import Point
from service.upstream.messages import Completion, LlmRequest, Reply
from service.utils.deadline import Deadline
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
