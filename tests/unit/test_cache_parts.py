"""The parts of the cache, each by itself: memory, queue, sweeping, the embedded store's thread."""

import asyncio
import functools
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ParamSpec

import portalocker
import pytest
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.trace import INVALID_SPAN_CONTEXT, NoOpTracer

from service.cache.control import CacheControl, parse_cache_control
from service.cache.embedded import EmbeddedStore, Priority
from service.cache.entries import MAX_CONTENT_BYTES, DamagedEntryError, Entry, EntryMemory
from service.cache.keys import CacheKey, key_of, tenant_of
from service.cache.response_cache import open_store
from service.cache.store import COLLECTION, Guard, GuardedStore, StoreError, VectorStore
from service.cache.sweeper import CacheSweeper
from service.cache.writer import CacheWriter, Write
from service.services.circuit_breaker import CircuitBreaker
from service.telemetry.providers import Exporters, build_telemetry
from service.upstream.messages import Completion
from tests.fakes.clock import FakeClock
from tests.harness import make_settings

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
    assert memory.get(key(1).digest, allow_stale=True) is not None
    clock.advance(100)
    assert memory.get(key(1).digest, allow_stale=True) is None
    assert len(memory) == 0


@pytest.mark.parametrize(
    ("header", "control"),
    [
        ("", CacheControl()),
        ("no-cache", CacheControl(read=False)),
        ("NO-STORE", CacheControl(store=False)),
        ("max-age=5, no-store", CacheControl(store=False, max_age_s=5)),
        ("max-age=0", CacheControl(read=False, max_age_s=0)),
        ('max-age="7"', CacheControl(max_age_s=7)),
        ("max-age=-1, max-age=x, only-if-cached", CacheControl()),
        ("max-age=99999999999999999999", CacheControl()),
    ],
)
def test_cache_control_is_parsed(header: str, control: CacheControl) -> None:
    assert parse_cache_control(header) == control


class Rig:
    """A store on an embedded client in memory, with its counts."""

    def __init__(self, store: VectorStore) -> None:
        self.reader = InMemoryMetricReader()
        self.telemetry = build_telemetry(make_settings(), Exporters(metrics=self.reader))
        self.tracer = NoOpTracer()
        self.store = GuardedStore(store, Guard(self.breaker), self.tracer, 5.0)

    def breaker(self, name: str) -> CircuitBreaker:
        return CircuitBreaker(name, 3, 10, self.telemetry.instruments)

    def writer(self, **more: Any) -> CacheWriter:
        return CacheWriter(self.store, self.telemetry, more.pop("max_bytes", 10_000), **more)

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
    async with open_store(make_settings(qdrant_path=path)) as store:
        made = Rig(store)
        yield made
        made.telemetry.shutdown(1)


def write(number: int, *, expires: float = 1e12, size: int = 100) -> Write:
    point = entry(number, created=float(number), ttl_s=expires - number).point()
    return Write(COLLECTION, lambda: point, size, expires, INVALID_SPAN_CONTEXT)


@in_loop
async def test_a_full_queue_drops_and_counts() -> None:
    async with rig() as made:
        writer = made.writer(max_bytes=250)
        for number in range(4):
            writer.put(write(number))

        assert (writer.waiting, writer.dropped) == (2, 2)
        await writer.flush(5)
        assert made.outcomes() == {"stored": 2, "dropped": 2, "failed": 0, "cleared": 0, "skipped": 0}
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
        await writer.wait_until_empty(5)
        running.cancel()

        assert len(waits) == 3
        assert made.outcomes()["stored"] == 1


@in_loop
async def test_expired_entries_are_not_written() -> None:
    async with rig() as made:
        writer = made.writer()
        writer.put(write(1, expires=49.0))
        await writer.flush(5)

        assert made.outcomes() == {"stored": 0, "dropped": 0, "failed": 0, "cleared": 0, "skipped": 0}


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
        sweeper = CacheSweeper(made.store, 10, NoOpTracer(), now=lambda: 2_000.0)

        assert await sweeper.sweep() == 10
        assert await made.store.count(COLLECTION) == 10
        left = {number for number in range(20) if await made.store.read(COLLECTION, key(number).point_id)}
        assert left == set(range(10, 20))
        sweeper.mark_for_removal(COLLECTION, key(15).point_id)
        assert await sweeper.sweep() == 1
        assert await made.store.read(COLLECTION, key(15).point_id) is None


@in_loop
async def test_a_thread_that_hangs_holds_up_nobody(tmp_path: Path) -> None:
    store = EmbeddedStore(str(tmp_path / "store"), max_waiting=2)
    await store.open()
    held, entered = threading.Event(), threading.Event()

    def hang() -> None:
        entered.set()
        held.wait(10)

    hanging = asyncio.create_task(store.run(hang))
    await asyncio.to_thread(entered.wait, 5)
    done: list[str] = []

    def note(name: str) -> Callable[[], None]:
        return lambda: done.append(name)

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await store.run(note("nobody waits for this"))
    waiting = asyncio.create_task(store.run(note("later"), Priority.WRITE))
    await asyncio.sleep(0)
    with pytest.raises(StoreError, match="busy"):
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

    def hang() -> None:
        entered.set()
        held.wait(10)

    hanging = asyncio.create_task(store.run(hang))
    await asyncio.to_thread(entered.wait, 5)
    order: list[str] = []
    later = asyncio.create_task(store.run(lambda: order.append("later"), Priority.WRITE))
    await asyncio.sleep(0)
    urgent = asyncio.create_task(store.run(lambda: order.append("urgent")))
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
    with pytest.raises(StoreError, match="not_open"):
        await store.read(COLLECTION, key(1).point_id)
    await store.close()


@in_loop
async def test_a_folder_belongs_to_one_store_at_a_time(tmp_path: Path) -> None:
    folder = str(tmp_path / "store")
    first, second = EmbeddedStore(folder), EmbeddedStore(folder)
    await first.open()
    with pytest.raises(portalocker.LockException):
        await second.open()
    await first.close()
    await second.open()
    await second.ping()
    await second.close()


@pytest.mark.parametrize(("size", "read"), [(1_000_000, True), (MAX_CONTENT_BYTES, False)])
def test_what_unpacks_to_too_much_is_no_entry(size: int, read: bool) -> None:  # noqa: FBT001 - the expected outcome
    choice = b'{"finish_reason": "stop", "message": {"content": "Said."}}'
    content = b'{"choices": [%b], "pad": "%b"}' % (choice, b"0" * size)
    packed = replace(entry(1), content=content).point().payload
    assert len(packed["packed"]) < size / 100
    if read:
        assert Entry.from_payload(key(1), packed).content == content
    else:
        with pytest.raises(DamagedEntryError):
            Entry.from_payload(key(1), packed)
