"""The parts of the cache, each by itself: memory, queue, sweeping, the embedded store's thread."""

import asyncio
import functools
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ParamSpec

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.trace import INVALID_SPAN_CONTEXT, NoOpTracer

from service.cache.control import CacheWish, wish_of
from service.cache.embedded import BusyStoreError, ClosedStoreError, EmbeddedStore
from service.cache.entries import Entry, EntryMemory
from service.cache.keys import CacheKey, key_of, tenant_of
from service.cache.store import CacheStore, Point, StoreError, Vectors, open_vectors
from service.cache.sweeper import CacheSweeper
from service.cache.writer import CacheWriter, Write
from service.services.circuit_breaker import CircuitBreaker
from service.telemetry.instruments import Instruments
from service.upstream.messages import Completion
from tests.fakes.clock import FakeClock
from tests.harness import make_settings

COLLECTION = "llmops_cache"
P = ParamSpec("P")


def in_loop(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Run a test that awaits in a loop of its own."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        asyncio.run(test(*args, **kwargs))

    return run


TENANT = tenant_of("user")


def key(number: int, tenant: str = TENANT) -> CacheKey:
    return key_of(tenant, "demo", {"messages": [{"role": "user", "content": str(number)}]})


def entry(number: int, *, created: float = 0.0, ttl_s: float = 100.0, size: int = 100) -> Entry:
    return Entry(
        key(number), "demo", created, created + ttl_s, b"x" * size, Completion("", "demo", total_tokens=1)
    )


def test_memory_is_bounded_in_bytes_and_the_unused_go_first() -> None:
    clock = FakeClock()
    one = entry(0).size_bytes
    memory = EntryMemory(3 * one, None, now=clock, clock=clock)
    for number in range(3):
        memory.put(entry(number))
    assert memory.get(key(0).digest) is not None
    memory.put(entry(3))

    assert [memory.get(key(number).digest) is not None for number in range(4)] == [True, False, True, True]
    assert memory.size_bytes == 3 * one
    memory.put(entry(3))
    assert (len(memory), memory.size_bytes) == (3, 3 * one)
    memory.put(entry(4, size=10 * one))
    assert len(memory) == 3


def test_memory_knows_ages() -> None:
    clock = FakeClock()
    memory = EntryMemory(10_000, 10, now=clock, clock=clock)
    memory.put(entry(1, created=clock(), ttl_s=100))
    clock.advance(11)
    assert memory.get(key(1).digest) is None, "others may have taken it out of the store"
    assert memory.get(key(1).digest, believed=True) is not None
    clock.advance(100)
    assert memory.get(key(1).digest, believed=True) is None
    assert len(memory) == 0


@pytest.mark.parametrize(
    ("field", "wish"),
    [
        ("", CacheWish()),
        ("no-cache", CacheWish(read=False)),
        ("NO-STORE", CacheWish(store=False)),
        ("max-age=5, no-store", CacheWish(store=False, max_age_s=5)),
        ("max-age=0", CacheWish(read=False, max_age_s=0)),
        ('max-age="7"', CacheWish(max_age_s=7)),
        ("max-age=-1, max-age=x, only-if-cached", CacheWish()),
        ("max-age=99999999999999999999", CacheWish()),
    ],
)
def test_a_wish_is_read(field: str, wish: CacheWish) -> None:
    assert wish_of(field) == wish


class Rig:
    """A store on an embedded client in memory, with its counts."""

    def __init__(self, vectors: Vectors) -> None:
        self.reader = InMemoryMetricReader()
        self.instruments = Instruments(MeterProvider([self.reader]).get_meter("test"))
        self.vectors = vectors
        self.tracer = NoOpTracer()
        breaker = CircuitBreaker("qdrant", 3, 10, self.instruments)
        self.store = CacheStore(vectors, breaker, self.tracer, 5.0)

    def writer(self, **more: Any) -> CacheWriter:
        return CacheWriter(self.store, self.instruments, self.tracer, more.pop("max_bytes", 10_000), **more)

    def outcomes(self) -> dict[str, int]:
        data = self.reader.get_metrics_data()
        assert data is not None
        return {
            str((point.attributes or {})["outcome"]): int(point.value)  # type: ignore[union-attr]  # a counter
            for resource in data.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
            if metric.name == "llmops.cache.writes"
            for point in metric.data.data_points
        }


@asynccontextmanager
async def rig(path: str = ":memory:") -> AsyncIterator[Rig]:
    async with open_vectors(make_settings(qdrant_path=path)) as vectors:
        yield Rig(vectors)


def write(number: int, *, expires: float = 1e12, size: int = 100) -> Write:
    payload = entry(number, created=float(number), ttl_s=expires - number).as_payload()
    return Write(
        COLLECTION, lambda: Point(key(number).point_id, payload), size, expires, INVALID_SPAN_CONTEXT
    )


@in_loop
async def test_a_full_queue_drops_and_counts() -> None:
    async with rig() as made:
        writer = made.writer(max_bytes=250)
        for number in range(4):
            writer.put(write(number))

        assert (writer.waiting, writer.dropped) == (2, 2)
        await writer.flush(5)
        assert made.outcomes() == {"stored": 2, "dropped": 2, "failed": 0}
        assert await made.store.count(COLLECTION) == 2


@in_loop
async def test_what_the_store_refuses_is_kept_and_written_later() -> None:
    waits: list[float] = []
    async with rig() as made:
        refusing = True
        real = made.store.write

        async def sometimes(collection: str, points: Any) -> None:
            if refusing:
                raise StoreError("told to")
            await real(collection, points)

        made.store.write = sometimes  # type: ignore[method-assign]  # the store's part in this

        async def sleep(seconds: float) -> None:
            nonlocal refusing
            waits.append(seconds)
            refusing = len(waits) < 3
            await asyncio.sleep(0)

        writer = made.writer(sleep=sleep)
        running = asyncio.create_task(writer.run())
        writer.put(write(1))
        await writer.idle(5)
        running.cancel()

        assert len(waits) == 3
        assert made.outcomes()["stored"] == 1


@in_loop
async def test_expired_entries_are_not_written() -> None:
    async with rig() as made:
        writer = made.writer(now=lambda: 50.0)
        writer.put(write(1, expires=49.0))
        await writer.flush(5)

        assert made.outcomes() == {"stored": 0, "dropped": 0, "failed": 0}


@in_loop
async def test_two_writers_of_one_answer_make_one_entry() -> None:
    async with rig() as made:
        for writer in (made.writer(), made.writer()):
            writer.put(write(1))
            await writer.flush(5)

        assert await made.store.count(COLLECTION) == 1


@in_loop
async def test_sweeping_takes_out_the_expired_and_then_the_oldest() -> None:
    async with rig() as made:
        points = [write(number, expires=1_000 if number < 5 else 1e12).build() for number in range(20)]
        await made.store.write(COLLECTION, points)
        sweeper = CacheSweeper(made.store, made.vectors, 10, NoOpTracer(), now=lambda: 2_000.0)

        assert await sweeper.sweep() == 10
        assert await made.store.count(COLLECTION) == 10
        left = {number for number in range(20) if await made.store.read(COLLECTION, key(number).point_id)}
        assert left == set(range(10, 20))
        sweeper.doom(COLLECTION, key(15).point_id)
        assert await sweeper.sweep() == 1
        assert await made.store.read(COLLECTION, key(15).point_id) is None


@in_loop
async def test_a_deleted_entry_leaves_nothing_in_the_embedded_clients_memory() -> None:
    async with rig() as made:
        await made.store.write(COLLECTION, [write(1).build()])
        await made.store.delete(COLLECTION, [key(1).point_id])

        def kept(client: Any) -> Any:
            return client._client.collections[COLLECTION].payload  # noqa: SLF001 - what it keeps is the question

        assert await made.vectors._call(kept) == [{}]  # noqa: SLF001 - the same


@in_loop
async def test_a_thread_that_hangs_holds_up_nobody(tmp_path: Path) -> None:
    store = EmbeddedStore(str(tmp_path / "store"), max_waiting=2)
    await store.open()
    held, entered = threading.Event(), threading.Event()

    def hang(_client: Any) -> None:
        entered.set()
        held.wait(10)

    hanging = asyncio.create_task(store.run(hang))
    await asyncio.to_thread(entered.wait, 5)
    done: list[str] = []

    def note(name: str) -> Callable[[Any], None]:
        return lambda _client: done.append(name)

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await store.run(note("nobody waits for this"))
    waiting = asyncio.create_task(store.run(note("later"), urgency=1))
    await asyncio.sleep(0)
    with pytest.raises(BusyStoreError):
        await store.run(note("too much"))
    held.set()
    await asyncio.gather(hanging, waiting)
    await store.close()

    assert done == ["later"]


@in_loop
async def test_what_is_urgent_goes_first(tmp_path: Path) -> None:
    store = EmbeddedStore(str(tmp_path / "store"))
    await store.open()
    held, entered = threading.Event(), threading.Event()

    def hang(_client: Any) -> None:
        entered.set()
        held.wait(10)

    hanging = asyncio.create_task(store.run(hang))
    await asyncio.to_thread(entered.wait, 5)
    order: list[str] = []
    later = asyncio.create_task(store.run(lambda _client: order.append("later"), urgency=1))
    await asyncio.sleep(0)
    urgent = asyncio.create_task(store.run(lambda _client: order.append("urgent")))
    await asyncio.sleep(0)
    held.set()
    await asyncio.gather(hanging, later, urgent)
    await store.close()

    assert order == ["urgent", "later"]


@in_loop
async def test_a_closed_store_says_so(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    store = EmbeddedStore(str(blocked))
    with pytest.raises(OSError, match="file"):
        await store.open()
    with pytest.raises(ClosedStoreError):
        await store.run(lambda client: client)
    await store.close()
