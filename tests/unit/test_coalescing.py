"""Equal calls share one call to the upstream; each caller has a deadline of their own and may leave."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from service.cache.coalescing import Coalescing, NoCoalescing
from service.errors import UpstreamError, UpstreamTimeoutError
from service.upstream.errors import timed_out
from service.upstream.messages import Completion, Reply
from service.utils.deadline import Deadline
from service.utils.retry import Progress
from tests.fakes.clock import FakeClock

REPLY = Reply(b"{}", Completion("text", "demo", cost=1.0))


class Bench:
    """Coalescing in a task group, with a clock that the test moves."""

    def __init__(self, tasks: asyncio.TaskGroup) -> None:
        self.clock = FakeClock()
        self.coalescing = Coalescing(tasks.create_task)
        self.gate = asyncio.Event()
        self.started = 0
        self.stopped = 0
        self.errors: list[Exception] = []
        self.billed_here = True

    async def work(self) -> tuple[Reply, bool]:
        self.started += 1
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.stopped += 1
            raise
        if self.errors:
            raise self.errors.pop()
        return REPLY, self.billed_here

    def join(self, limit_s: float = 30.0) -> asyncio.Task[tuple[Reply, bool]]:
        deadline = Deadline.after(limit_s, clock=self.clock)
        return asyncio.create_task(self.coalescing.share("x", deadline, Progress(), self.work))


def run(scene: Callable[[Bench], Coroutine[Any, Any, None]]) -> None:
    async def play() -> None:
        async with asyncio.TaskGroup() as tasks:
            await scene(Bench(tasks))

    asyncio.run(play())


async def turns(number: int = 5) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


def test_one_caller_works_and_is_billed() -> None:
    async def scene(bench: Bench) -> None:
        joined = [bench.join() for _ in range(5)]
        await turns()
        bench.gate.set()
        assert [billed for _, billed in await asyncio.gather(*joined)] == [True, *[False] * 4]
        assert bench.started == 1
        assert not bench.coalescing.in_flight("x")

    run(scene)


def test_the_next_caller_is_billed_when_the_leader_has_left() -> None:
    async def scene(bench: Bench) -> None:
        joined = [bench.join() for _ in range(4)]
        await turns()
        joined[0].cancel()
        await turns()
        bench.gate.set()
        answers = await asyncio.gather(*joined[1:])
        assert [billed for _, billed in answers] == [True, False, False]
        assert (bench.started, bench.stopped) == (1, 0)

    run(scene)


def test_the_work_is_cancelled_when_nobody_waits_and_made_again_for_a_new_caller() -> None:
    async def scene(bench: Bench) -> None:
        joined = [bench.join() for _ in range(3)]
        await turns()
        for task in joined:
            task.cancel()
        await turns(10)
        assert bench.stopped == 1
        assert not bench.coalescing.in_flight("x")
        again = bench.join()
        await turns()
        bench.gate.set()
        assert (await again)[1] is True
        assert bench.started == 2

    run(scene)


def test_an_error_reaches_all_callers() -> None:
    async def scene(bench: Bench) -> None:
        bench.errors = [UpstreamError(label="broken")]
        joined = [bench.join() for _ in range(3)]
        await turns()
        bench.gate.set()
        for result in await asyncio.gather(*joined, return_exceptions=True):
            assert isinstance(result, UpstreamError)
        assert bench.started == 1

    run(scene)


def test_an_error_that_nobody_waits_for_is_not_reported() -> None:
    async def scene(bench: Bench) -> None:
        joined = bench.join()
        await turns()
        bench.errors = [UpstreamError(label="broken")]
        bench.gate.set()
        joined.cancel()
        await turns()

    run(scene)


def test_a_follower_with_more_time_than_the_leader_tries_again() -> None:
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

    run(scene)


def test_a_follower_with_less_time_than_the_leader_leaves_at_its_own_deadline() -> None:
    async def scene(bench: Bench) -> None:
        first = bench.join()
        await turns()
        late = bench.join(limit_s=0)
        with pytest.raises(UpstreamTimeoutError):
            await late
        bench.gate.set()
        assert (await first)[0] == REPLY

    run(scene)


def test_nobody_is_billed_for_what_another_process_made() -> None:
    async def scene(bench: Bench) -> None:
        bench.billed_here = False
        joined = [bench.join() for _ in range(3)]
        await turns()
        joined[0].cancel()
        await turns()
        bench.gate.set()
        assert [billed for _, billed in await asyncio.gather(*joined[1:])] == [False, False]

    run(scene)


def test_without_coalescing_each_caller_works_and_is_billed() -> None:
    async def scene(bench: Bench) -> None:
        coalescing = NoCoalescing()
        bench.gate.set()
        deadline = Deadline.after(30, clock=bench.clock)
        made = [coalescing.share("x", deadline, Progress(), bench.work) for _ in range(2)]
        assert not coalescing.in_flight("x")
        assert await asyncio.gather(*made) == [(REPLY, True), (REPLY, True)]
        assert bench.started == 2

    run(scene)
