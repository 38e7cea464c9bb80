"""The event loop's lag, measured; the steps of the stop, each within its limit."""

import asyncio
import time
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, cast

import pytest

from service.config.lifespan import (
    MIN_STEP_S,
    STEP_TIMEOUT_S,
    STEPS_TIMEOUT_S,
    _Closing,
    measure_lag,
)
from tests.harness import running_app

if TYPE_CHECKING:
    from opentelemetry.metrics import Histogram


class Recorder:
    """A histogram that keeps what it is given."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self.recorded = asyncio.Event()

    def record(self, amount: float, *_rest: Any) -> None:
        self.values.append(amount)
        self.recorded.set()

    async def more(self, count: int) -> None:
        """Wait for so many values in all."""
        while len(self.values) < count:
            self.recorded.clear()
            await self.recorded.wait()


def test_what_blocks_the_loop_is_measured() -> None:
    async def main() -> list[float]:
        recorder = Recorder()
        task = asyncio.create_task(measure_lag(cast("Histogram", recorder), interval_s=0.01))
        async with asyncio.timeout(10):
            await recorder.more(1)
            time.sleep(0.2)  # noqa: ASYNC251 - blocking the loop is what is measured
            blocked_after = len(recorder.values)
            await recorder.more(blocked_after + 3)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        return recorder.values

    values = asyncio.run(main())
    assert all(value >= 0 for value in values)
    assert sum(value > 0.15 for value in values) == 1
    assert max(values) < 5


def test_the_running_service_measures_it() -> None:
    with running_app() as app:
        end = time.monotonic() + 10
        while not app.value("llmops.event_loop.lag"):
            assert time.monotonic() < end, "no lag was recorded"
            time.sleep(0.01)


class Step:
    """Something to close, which takes as long as it is told, or fails."""

    def __init__(self, log: list[str], name: str, does: str = "ends") -> None:
        self._log, self.name, self._does = log, name, does
        self.took_s = -1.0

    async def __aenter__(self) -> str:
        self._log.append(f"open {self.name}")
        if self._does == "does not open":
            raise OSError(self.name)
        return self.name

    async def __aexit__(self, *_exception: object) -> None:
        self._log.append(f"close {self.name}")
        began = asyncio.get_running_loop().time()
        try:
            if self._does == "hangs":
                await asyncio.Event().wait()
            if self._does == "fails":
                raise OSError(self.name)
            if self._does == "is cancelled":
                raise asyncio.CancelledError
        finally:
            self.took_s = asyncio.get_running_loop().time() - began


IN_VAIN = "A step of the stop was not done in time"


def closed(*steps: Step, limits_s: tuple[float, ...] = (), spare_s: float = 0.0) -> float:
    """Enter all, and leave them as the service does; how long leaving took."""

    async def scenario() -> float:
        loop = asyncio.get_running_loop()
        async with AsyncExitStack() as stack:
            closing = _Closing(stack, lambda: spare_s)
            for number, step in enumerate(steps):
                limit = limits_s[number] if number < len(limits_s) else STEP_TIMEOUT_S
                assert await closing.enter(step, f"Closing {step.name}...", limit) == step.name
            began = loop.time()
        return loop.time() - began

    return asyncio.run(scenario())


def test_steps_of_the_stop_come_in_the_reverse_order_with_their_lines(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    log: list[str] = []
    closed(Step(log, "a"), Step(log, "b"))
    assert log == ["open a", "open b", "close b", "close a"]
    assert caplog.messages == ["Closing b...", "Closing a..."]


def test_a_step_that_fails_is_logged_and_the_next_comes(caplog: pytest.LogCaptureFixture) -> None:
    log: list[str] = []
    closed(Step(log, "a"), Step(log, "b", "fails"))
    assert log[2:] == ["close b", "close a"]
    (failure,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert failure.getMessage() == "A step of the stop failed"
    # A filter that another test has put in place has made fields of it.
    error = failure.exc_info[1] if failure.exc_info else None
    assert isinstance(error, OSError) or "OSError" in vars(failure).get("exception.stacktrace", "")


def test_a_step_that_hangs_is_left_at_its_limit_and_the_next_comes(caplog: pytest.LogCaptureFixture) -> None:
    log: list[str] = []
    slow, last = Step(log, "b", "hangs"), Step(log, "a")
    closed(last, slow, limits_s=(1.0, 0.1))
    assert log[2:] == ["close b", "close a"]
    assert 0.1 <= slow.took_s < STEP_TIMEOUT_S
    assert last.took_s >= 0
    assert caplog.messages.count(IN_VAIN) == 1


def test_steps_that_all_hang_are_left_within_the_limit_of_all_and_each_gets_a_moment(
    caplog: pytest.LogCaptureFixture,
) -> None:
    log: list[str] = []
    steps = [Step(log, name, "hangs") for name in "abcd"]
    took_s = closed(*steps, limits_s=(1.0, 60.0, 60.0, 0.2))
    # d takes its own time, c all that is left, and for the others there is a moment each.
    assert [step.took_s >= MIN_STEP_S for step in steps] == [True] * 4
    assert STEPS_TIMEOUT_S <= took_s < STEPS_TIMEOUT_S + 2 * MIN_STEP_S + 1.0
    assert caplog.messages.count(IN_VAIN) == 4


def test_what_the_drain_left_of_its_time_is_the_steps_too() -> None:
    step = Step([], "a", "hangs")
    closed(step, limits_s=(60.0,), spare_s=0.5)
    assert STEPS_TIMEOUT_S + 0.5 <= step.took_s < STEPS_TIMEOUT_S + 5
    late = Step([], "a", "hangs")
    closed(late, limits_s=(60.0,), spare_s=-3.0)
    assert STEPS_TIMEOUT_S <= late.took_s < STEPS_TIMEOUT_S + 5


def test_what_cannot_be_opened_stops_the_start_and_what_was_opened_is_closed() -> None:
    log: list[str] = []
    with pytest.raises(OSError, match="b"):
        closed(Step(log, "a"), Step(log, "b", "does not open"))
    assert log == ["open a", "open b", "close a"]


def test_a_stop_that_is_cancelled_does_not_go_on_as_if_nothing_were() -> None:
    log: list[str] = []
    with pytest.raises(asyncio.CancelledError):
        closed(Step(log, "a"), Step(log, "b", "is cancelled"))
    assert log[2:] == ["close b", "close a"]
