"""When the list of models is read again, and by how many at once."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from service.errors import BadRequestError, UpstreamError
from service.upstream.offered_models import OfferedModels
from service.utils.deadline import Deadline
from tests.fakes.clock import FakeClock


class Upstream:
    """Counts how often its list is read, and lets a test hold up or fail a reading."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.models = ["demo"]
        self.reads = 0
        self.fails = False
        self.free = asyncio.Event()
        self.free.set()
        self.offered = OfferedModels(self._read, self.clock)

    async def _read(self) -> None:
        self.reads += 1
        await self.free.wait()
        if self.fails:
            raise UpstreamError
        self.offered.learn(self.models, [])

    async def offers(self, model: str, limit_s: float = 30.0) -> bool:
        try:
            await self.offered.check(model, Deadline.after(limit_s))
        except BadRequestError:
            return False
        return True


def run(test: Callable[[Upstream], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        await test(Upstream())

    asyncio.run(main())


def test_a_list_that_is_not_known_refuses_nothing() -> None:
    async def test(upstream: Upstream) -> None:
        assert await upstream.offers("new")
        assert upstream.reads == 0

    run(test)


def test_an_old_list_is_read_again_once_for_a_name_that_is_not_on_it() -> None:
    async def test(upstream: Upstream) -> None:
        assert await upstream.offered.refresh()
        upstream.models = ["demo", "new"]
        # The list is young: a name that is not on it causes nothing.
        assert not await upstream.offers("new")
        upstream.clock.advance(10.0)
        assert await upstream.offers("demo")
        assert upstream.reads == 1
        assert await upstream.offers("new")
        for _ in range(100):
            assert not await upstream.offers("unknown")
        assert upstream.reads == 2

    run(test)


def test_many_callers_wait_for_one_reading() -> None:
    async def test(upstream: Upstream) -> None:
        await upstream.offered.refresh()
        upstream.clock.advance(60.0)
        upstream.models = ["demo", "new"]
        upstream.free.clear()
        waiting = [asyncio.create_task(upstream.offers("new")) for _ in range(50)]
        await asyncio.sleep(0)
        upstream.free.set()
        assert all(await asyncio.gather(*waiting))
        assert upstream.reads == 2

    run(test)


def test_a_caller_who_leaves_takes_nothing_from_those_who_wait() -> None:
    async def test(upstream: Upstream) -> None:
        await upstream.offered.refresh()
        upstream.clock.advance(60.0)
        upstream.free.clear()
        leaving = asyncio.create_task(upstream.offers("new"))
        await asyncio.sleep(0)
        waiting = asyncio.create_task(upstream.offers("demo2"))
        await asyncio.sleep(0)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        upstream.free.set()
        assert not await waiting

    run(test)


def test_a_list_that_cannot_be_read_any_more_refuses_nothing_and_is_not_read_for_every_call() -> None:
    async def test(upstream: Upstream) -> None:
        await upstream.offered.refresh()
        upstream.clock.advance(60.0)
        upstream.fails = True
        for _ in range(10):
            assert await upstream.offers("new")
        assert upstream.reads == 2
        upstream.fails = False
        assert await upstream.offered.refresh()
        assert not await upstream.offers("new")

    run(test)


def test_a_slow_list_holds_up_no_call_beyond_its_deadline() -> None:
    async def test(upstream: Upstream) -> None:
        await upstream.offered.refresh()
        upstream.clock.advance(60.0)
        upstream.free.clear()
        assert await upstream.offers("new", limit_s=0.05)

    run(test)
