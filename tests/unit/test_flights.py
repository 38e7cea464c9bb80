"""Equal calls share one; deadlines, leaving and errors are each caller's own."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from service.cache.coalescing import Flights
from service.errors import UpstreamError, UpstreamTimeoutError
from service.upstream.errors import timed_out
from service.upstream.messages import Completion, Reply
from service.utils.deadline import Deadline
from service.utils.retry import Progress
from tests.fakes.clock import FakeClock

REPLY = Reply(b"{}", Completion("text", "demo", cost=1.0))


class Bench:
    """Flights in a task group, with a clock that the test moves."""

    def __init__(self, tasks: asyncio.TaskGroup) -> None:
        self.clock = FakeClock()
        self.flights = Flights(tasks.create_task)
        self.gate = asyncio.Event()
        self.started = 0
        self.stopped = 0
        self.errors: list[Exception] = []

    async def work(self) -> Reply:
        self.started += 1
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.stopped += 1
            raise
        if self.errors:
            raise self.errors.pop()
        return REPLY

    def join(self, limit_s: float = 30.0) -> asyncio.Task[tuple[Reply, bool]]:
        deadline = Deadline.after(limit_s, clock=self.clock)
        return asyncio.create_task(self.flights.share("x", deadline, Progress(), self.work))


def played(scene: Callable[[Bench], Coroutine[Any, Any, None]]) -> None:
    async def play() -> None:
        async with asyncio.TaskGroup() as tasks:
            await scene(Bench(tasks))

    asyncio.run(play())


async def turns(number: int = 5) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


def test_one_works_and_pays() -> None:
    async def scene(bench: Bench) -> None:
        joined = [bench.join() for _ in range(5)]
        await turns()
        bench.gate.set()
        assert [pays for _, pays in await asyncio.gather(*joined)] == [True, *[False] * 4]
        assert bench.started == 1
        assert "x" not in bench.flights

    played(scene)


def test_who_is_next_pays_when_the_first_has_left() -> None:
    async def scene(bench: Bench) -> None:
        joined = [bench.join() for _ in range(4)]
        await turns()
        joined[0].cancel()
        await turns()
        bench.gate.set()
        answers = await asyncio.gather(*joined[1:])
        assert [pays for _, pays in answers] == [True, False, False]
        assert (bench.started, bench.stopped) == (1, 0)

    played(scene)


def test_the_work_stops_when_nobody_waits_and_a_newcomer_begins_anew() -> None:
    async def scene(bench: Bench) -> None:
        joined = [bench.join() for _ in range(3)]
        await turns()
        for task in joined:
            task.cancel()
        await turns(10)
        assert bench.stopped == 1
        assert "x" not in bench.flights
        again = bench.join()
        await turns()
        bench.gate.set()
        assert (await again)[1] is True
        assert bench.started == 2

    played(scene)


def test_an_error_is_everybodys() -> None:
    async def scene(bench: Bench) -> None:
        bench.errors = [UpstreamError(label="broken")]
        joined = [bench.join() for _ in range(3)]
        await turns()
        bench.gate.set()
        for result in await asyncio.gather(*joined, return_exceptions=True):
            assert isinstance(result, UpstreamError)
        assert bench.started == 1

    played(scene)


def test_an_error_that_nobody_waits_for_is_nobodys() -> None:
    async def scene(bench: Bench) -> None:
        joined = bench.join()
        await turns()
        bench.errors = [UpstreamError(label="broken")]
        bench.gate.set()
        joined.cancel()
        await turns()

    played(scene)


def test_who_has_more_time_than_the_first_goes_on_alone() -> None:
    async def scene(bench: Bench) -> None:
        first = bench.join(limit_s=1)
        await turns()
        second = bench.join(limit_s=100)
        await turns()
        bench.clock.advance(2)
        bench.errors = [timed_out(1)]
        bench.gate.set()
        with pytest.raises(UpstreamTimeoutError):
            await first
        assert (await second)[1] is True
        assert bench.started == 2

    played(scene)


def test_who_has_less_time_than_the_first_leaves_at_their_own_deadline() -> None:
    async def scene(bench: Bench) -> None:
        first = bench.join()
        await turns()
        late = bench.join(limit_s=0)
        with pytest.raises(UpstreamTimeoutError):
            await late
        bench.gate.set()
        assert (await first)[0] == REPLY

    played(scene)
