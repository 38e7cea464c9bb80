"""The event loop's lag, measured."""

import asyncio
import time
from typing import TYPE_CHECKING, Any, cast

from service.config.lifespan import measure_lag
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
