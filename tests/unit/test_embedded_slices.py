"""The embedded store's one thread: look-ups go first, then writes, then the sweep, which works in slices."""

import asyncio
import itertools
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.trace import NoOpTracer
from qdrant_client import QdrantClient, models

from service.cache import embedded
from service.cache.embedded import MEMORY, EmbeddedStore, Priority
from service.cache.store import (
    COLLECTION,
    OLDEST_FIRST,
    Point,
    equal_to,
    expired_at,
    vectors_config,
)
from service.cache.sweeper import CacheSweeper
from tests.unit.test_cache_parts import Rig, in_loop

NUMBER = 4_000

T = TypeVar("T")


def point(number: int, **fields: Any) -> Point:
    payload = {"tenant": "t", "model": "m", "created": float(number), "expires": 1e12, "body": "x" * 100}
    return Point(str(uuid.UUID(int=number)), {**payload, **fields})


@asynccontextmanager
async def opened(location: str = MEMORY, **options: Any) -> AsyncIterator[EmbeddedStore]:
    store = EmbeddedStore(location, **options)
    try:
        await store.open()
        await store.ensure(COLLECTION, None)
        yield store
    finally:
        await store.close()


async def waits_during(store: EmbeddedStore, work: Coroutine[Any, Any, Any]) -> tuple[list[float], float]:
    """How long look-ups take, one after another, while the work is done; and how long that takes."""
    started_s = time.perf_counter()
    working = asyncio.create_task(work)
    waits_s: list[float] = []
    while not working.done():
        asked_s = time.perf_counter()
        await store.read(COLLECTION, point(NUMBER).id)
        waits_s.append(time.perf_counter() - asked_s)
        # A look-up that finds nothing at once does not let others go on.
        await asyncio.sleep(0)
    await working
    return waits_s, time.perf_counter() - started_s


WORK: dict[str, Callable[[EmbeddedStore], Coroutine[Any, Any, Any]]] = {
    "delete": lambda store: store.delete(COLLECTION, [point(number).id for number in range(NUMBER)]),
    "write": lambda store: store.write(COLLECTION, [point(number) for number in range(NUMBER // 10)]),
    "oldest": lambda store: store.ids(COLLECTION, 100, order_by=OLDEST_FIRST),
    "expired": lambda store: store.ids(COLLECTION, 100, expired_at(0)),
    "one tenant's": lambda store: store.ids(COLLECTION, 100, equal_to({"tenant": "other"})),
}


class WatchedStore(EmbeddedStore):
    """Counts the slices that its thread begins, and those that begin while a look-up waits."""

    def __init__(self, location: str, **options: Any) -> None:
        super().__init__(location, **options)
        self.slices = 0
        self.overtaken: list[int] = []

    async def run(self, work: Callable[[], T], priority: Priority = Priority.LOOKUP) -> T:
        before = self.slices

        def look_up() -> T:
            self.overtaken.append(self.slices - before)
            return work()

        def work_on() -> T:
            self.slices += 1
            return work()

        return await super().run(look_up if priority is Priority.LOOKUP else work_on, priority)


@pytest.mark.parametrize(
    ("work", "steps"), [("delete", 500), ("write", 400), ("oldest", 5), ("expired", 5), ("one tenant's", 5)]
)
@in_loop
async def test_look_ups_have_their_turn_within_work_that_takes_long(work: str, steps: int) -> None:
    # With no time for a slice, each of its steps is one.
    store = WatchedStore(MEMORY, slice_s=0)
    await store.open()
    await store.ensure(COLLECTION, None)
    await store.write(COLLECTION, [point(number) for number in range(NUMBER + 1)])
    store.slices, store.overtaken = 0, []
    await waits_during(store, WORK[work](store))
    await store.close()
    assert store.slices >= steps
    # The thread may begin one slice after the count is read and before the look-up is in its queue.
    assert max(store.overtaken) <= 1


class CountingStore(EmbeddedStore):
    """Counts what its thread is given to do."""

    jobs = 0

    async def run(self, work: Callable[[], T], priority: Priority = Priority.LOOKUP) -> T:
        self.jobs += 1
        return await super().run(work, priority)


@in_loop
async def test_a_slice_is_as_long_as_its_time() -> None:
    ticks = itertools.count()
    store = CountingStore(MEMORY, slice_s=10, clock=lambda: next(ticks))
    await store.open()
    await store.ensure(COLLECTION, None)
    await store.write(COLLECTION, [point(number) for number in range(NUMBER)])
    before = store.jobs
    await store.delete(COLLECTION, [point(number).id for number in range(NUMBER)])
    # A step takes one tick of this clock.
    assert store.jobs - before == NUMBER / embedded.DELETE_STEP / 10
    await store.close()


@in_loop
@pytest.mark.alone
async def test_a_sweep_enforces_the_bound_and_look_ups_do_not_wait_for_it(tmp_path: Path) -> None:
    async with opened(str(tmp_path)) as store:
        await store.write(COLLECTION, [point(number) for number in range(NUMBER + 1)])
        made = Rig(store)
        sweeper = CacheSweeper(made.store, NUMBER // 4, NoOpTracer())
        waits_s, sweep_s = await waits_during(store, sweeper.sweep())
        left = await store.ids(COLLECTION, NUMBER, order_by=OLDEST_FIRST)
        made.telemetry.shutdown(1)
    assert left == [point(number).id for number in range(NUMBER + 1 - NUMBER // 4, NUMBER + 1)]
    assert max(waits_s) < sweep_s / 5


@in_loop
async def test_what_a_caller_waits_for_is_done_first() -> None:
    async with opened() as store:
        gate, done = asyncio.Event(), list[str]()
        loop = asyncio.get_running_loop()
        first = asyncio.create_task(
            store.run(lambda: asyncio.run_coroutine_threadsafe(gate.wait(), loop).result())
        )
        await asyncio.sleep(0)
        waiting = [
            asyncio.create_task(store.run(partial(done.append, priority.name), priority))
            for priority in (Priority.SWEEP, Priority.WRITE, Priority.LOOKUP)
        ]
        await asyncio.sleep(0)
        gate.set()
        await asyncio.gather(first, *waiting)
    assert done == ["LOOKUP", "WRITE", "SWEEP"]


@in_loop
@pytest.mark.alone
async def test_look_ups_find_nothing_while_the_folder_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "COMPACT_AFTER", NUMBER // 2)
    async with opened(str(tmp_path)) as store:
        await store.write(COLLECTION, [point(number) for number in range(NUMBER + 1)])
        waits_s, deletion_s = await waits_during(
            store, store.delete(COLLECTION, [point(number).id for number in range(NUMBER // 2)])
        )
        assert await store.read(COLLECTION, point(NUMBER).id) is not None
        assert await store.count(COLLECTION) == NUMBER // 2 + 1
        assert await store.ids(COLLECTION, 1, order_by=OLDEST_FIRST) == [point(NUMBER // 2).id]
    assert max(waits_s) < deletion_s / 4


FEW = st.integers(0, 3)


@given(
    st.lists(st.tuples(FEW, FEW, st.floats(0, 9), st.floats(0, 9)), max_size=12), FEW, FEW, st.floats(0, 9)
)
def test_points_are_found_as_qdrant_finds_them(
    given_points: list[tuple[int, int, float, float]], tenant: int, model: int, now: float
) -> None:
    points = [
        point(number, tenant=f"t{of}", model=f"m{by}", created=created, expires=expires)
        for number, (of, by, created, expires) in enumerate(given_points)
    ]
    plain = QdrantClient(":memory:")
    plain.create_collection(COLLECTION, vectors_config=vectors_config(None))
    if points:
        plain.upsert(COLLECTION, [one.as_struct() for one in points])

    async def found(which: models.Filter | None) -> list[str]:
        async with opened() as store:
            await store.write(COLLECTION, points)
            return await store.ids(COLLECTION, 100, which)

    for which in (None, equal_to({"tenant": f"t{tenant}", "model": f"m{model}"}), expired_at(now)):
        records, _ = plain.scroll(COLLECTION, scroll_filter=which, limit=100)
        assert sorted(asyncio.run(found(which))) == sorted(str(record.id) for record in records)
    plain.close()
