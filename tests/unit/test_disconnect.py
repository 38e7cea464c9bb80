"""Work is cancelled when its caller disconnects; nothing else about the work changes."""

import asyncio
from collections.abc import Coroutine
from contextvars import ContextVar
from typing import Any

import pytest

from service.errors import CallerLeftError
from service.utils.disconnect import cancel_on_disconnect

REQUEST = {"type": "http.request", "body": b"", "more_body": False}
DISCONNECT = {"type": "http.disconnect"}


class Caller:
    """The ASGI ``receive`` of a caller: messages as the test hands them in."""

    def __init__(self, *messages: dict[str, Any]) -> None:
        self._messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        for message in messages:
            self._messages.put_nowait(message)
        self.taken = 0
        self._took = asyncio.Condition()

    async def receive(self) -> dict[str, Any]:
        message = await self._messages.get()
        async with self._took:
            self.taken += 1
            self._took.notify_all()
        return message

    async def has_sent(self, count: int) -> None:
        async with self._took:
            await self._took.wait_for(lambda: self.taken >= count)

    def leave(self) -> None:
        self._messages.put_nowait(DISCONNECT)


class Work:
    """Something that lasts until it is cancelled."""

    def __init__(self) -> None:
        self.started = asyncio.Event()
        self.cancelled = False

    async def last(self) -> str:
        self.started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        return "never"


def _run(main: Coroutine[Any, Any, None]) -> None:
    """Run it, and see that no task is left behind."""

    async def alone() -> None:
        async with asyncio.timeout(10):
            await main
        # One turn, in which a watcher that was cancelled ends.
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(alone())


def test_the_result_comes_back() -> None:
    async def main() -> None:
        caller = Caller()

        async def work() -> str:
            await asyncio.sleep(0)
            return "done"

        assert await cancel_on_disconnect(caller.receive, work()) == "done"

    _run(main())


def test_work_that_does_not_suspend_creates_no_task_and_reads_no_message() -> None:
    async def main() -> None:
        caller = Caller(REQUEST, DISCONNECT)
        created: list[Any] = []
        loop = asyncio.get_running_loop()
        loop.set_task_factory(lambda loop, work, **options: _recorded(created, loop, work, options))

        async def work() -> str:
            return "done"

        assert await cancel_on_disconnect(caller.receive, work()) == "done"
        await asyncio.sleep(0)
        loop.set_task_factory(None)
        assert created == []
        assert caller.taken == 0

    _run(main())


def _recorded(
    created: list[Any], loop: asyncio.AbstractEventLoop, work: Any, options: dict[str, Any]
) -> asyncio.Task[Any]:
    created.append(work)
    return asyncio.Task(work, loop=loop, **options)


def test_a_caller_who_leaves_stops_the_work() -> None:
    async def main() -> None:
        caller, work = Caller(), Work()
        task = asyncio.create_task(cancel_on_disconnect(caller.receive, work.last()))
        await work.started.wait()
        assert not task.done()
        caller.leave()
        with pytest.raises(CallerLeftError) as caught:
            await task
        assert work.cancelled
        assert caught.value.status == 499
        assert not task.cancelled()

    _run(main())


def test_a_caller_who_left_before_stops_the_work_at_once() -> None:
    async def main() -> None:
        work = Work()
        with pytest.raises(CallerLeftError):
            await cancel_on_disconnect(Caller(DISCONNECT).receive, work.last())
        assert work.cancelled

    _run(main())


def test_other_messages_are_skipped() -> None:
    async def main() -> None:
        caller, work = Caller(REQUEST, REQUEST), Work()
        task = asyncio.create_task(cancel_on_disconnect(caller.receive, work.last()))
        await work.started.wait()
        await caller.has_sent(2)
        assert not work.cancelled
        caller.leave()
        with pytest.raises(CallerLeftError):
            await task
        assert caller.taken == 3

    _run(main())


@pytest.mark.parametrize("kind", [ValueError, TimeoutError, KeyError])
def test_the_works_own_exception_passes(kind: type[Exception]) -> None:
    async def main() -> None:
        async def work() -> None:
            await asyncio.sleep(0)
            raise kind("of the work")

        with pytest.raises(kind, match="of the work"):
            await cancel_on_disconnect(Caller().receive, work())

    _run(main())


def test_the_works_own_time_limit_is_not_the_callers_leaving() -> None:
    async def main() -> None:
        async def work() -> None:
            async with asyncio.timeout(0):
                await asyncio.Event().wait()

        with pytest.raises(TimeoutError):
            await cancel_on_disconnect(Caller().receive, work())

    _run(main())


def test_cancellation_from_outside_stays_cancellation() -> None:
    async def main() -> None:
        caller, work = Caller(), Work()
        task = asyncio.create_task(cancel_on_disconnect(caller.receive, work.last()))
        await work.started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert work.cancelled
        assert task.cancelled()

    _run(main())


def test_a_time_limit_around_it_stays_a_time_limit() -> None:
    async def main() -> None:
        work = Work()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await cancel_on_disconnect(Caller().receive, work.last())
        assert work.cancelled

    _run(main())


def test_the_work_runs_in_the_callers_own_task_and_context() -> None:
    variable: ContextVar[str] = ContextVar("variable", default="unset")

    async def main() -> None:
        async def work() -> asyncio.Task[Any] | None:
            variable.set("by the work")
            return asyncio.current_task()

        assert await cancel_on_disconnect(Caller().receive, work()) is asyncio.current_task()
        assert variable.get() == "by the work"

    _run(main())


def test_after_a_caller_left_the_task_can_go_on() -> None:
    async def main() -> None:
        with pytest.raises(CallerLeftError):
            await cancel_on_disconnect(Caller(DISCONNECT).receive, Work().last())
        current = asyncio.current_task()
        assert current is not None
        assert current.cancelling() == 0
        await asyncio.sleep(0)

    _run(main())
