"""The checker: what it says before, between and after results, and how often it asks."""

import asyncio

import pytest
from opentelemetry.sdk.trace import TracerProvider

from service.errors import UpstreamError
from service.services.health_checker import FRESH_S, HealthChecker, HealthSchedule
from tests.fakes.clock import FakeClock
from tests.unit.resilience import Readable


class Dependency:
    """Something to ping, up or not; counts."""

    def __init__(self) -> None:
        self.pings = 0
        self.at_once = self.most_at_once = 0
        self.error: Exception | None = None
        self.hangs = False
        self.asked = asyncio.Event()

    async def ping(self) -> None:
        self.pings += 1
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        self.asked.set()
        try:
            if self.hangs:
                await asyncio.Event().wait()
            if self.error is not None:
                raise self.error
        finally:
            self.at_once -= 1

    async def next_ping(self) -> None:
        self.asked.clear()
        await asyncio.wait_for(self.asked.wait(), 5)
        # The result is there when the ping's task has gone on to wait.
        await asyncio.sleep(0)
        await asyncio.sleep(0.01)


def make(metrics: Readable, dependency: Dependency, **numbers: float) -> HealthChecker:
    settings = {"interval_s": 60.0, "timeout_s": 0.05, "ttl_s": 30.0, **numbers}
    return HealthChecker(
        {"litellm": dependency.ping},
        HealthSchedule(settings["interval_s"], settings["timeout_s"], settings["ttl_s"], jitter=lambda: 0.5),
        metrics.instruments,
        TracerProvider(shutdown_on_exit=False).get_tracer("test"),
    )


def test_before_the_first_result_it_does_not_guess(metrics: Readable) -> None:
    health = make(metrics, Dependency()).health()["litellm"]
    assert (health.up, health.error, health.age_s) == (False, "not checked yet", None)
    assert metrics.value("llmops.health.status", dependency="litellm") == 0


def test_up_down_up_is_told_once_each(metrics: Readable, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")

    async def scenario() -> None:
        dependency = Dependency()
        checker = make(metrics, dependency, interval_s=0.02)
        task = asyncio.create_task(checker.run())
        await dependency.next_ping()
        assert checker.health()["litellm"].up
        assert metrics.value("llmops.health.status", dependency="litellm") == 1
        dependency.error = UpstreamError(label="HTTP 503")
        await dependency.next_ping()
        await dependency.next_ping()
        health = checker.health()["litellm"]
        assert (health.up, health.error) == (False, "HTTP 503")
        assert metrics.value("llmops.health.status", dependency="litellm") == 0
        dependency.error = None
        await dependency.next_ping()
        await dependency.next_ping()
        assert checker.health()["litellm"].up
        task.cancel()
        await asyncio.wait([task])

    asyncio.run(scenario())
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("INFO", "litellm is up"),
        ("WARNING", "litellm is down: HTTP 503"),
        ("INFO", "litellm is up"),
    ]


@pytest.mark.parametrize(
    ("error", "said"), [(ValueError("prompt"), "ValueError"), (OSError("secret"), "OSError")]
)
def test_an_unforeseen_error_is_named_and_not_quoted(metrics: Readable, error: Exception, said: str) -> None:
    async def scenario() -> str | None:
        dependency = Dependency()
        dependency.error = error
        checker = make(metrics, dependency)
        task = asyncio.create_task(checker.run())
        await dependency.next_ping()
        task.cancel()
        await asyncio.wait([task])
        return checker.health()["litellm"].error

    assert asyncio.run(scenario()) == said


def test_a_ping_that_hangs_is_down_and_asked_one_at_a_time(metrics: Readable) -> None:
    async def scenario() -> None:
        dependency = Dependency()
        dependency.hangs = True
        checker = make(metrics, dependency, interval_s=0.01)
        task = asyncio.create_task(checker.run())
        await dependency.next_ping()
        for _ in range(100):
            checker.check_now("litellm")
        await dependency.next_ping()
        assert dependency.most_at_once == 1
        health = checker.health()["litellm"]
        assert (health.up, health.error) == (False, "no answer within 0.05 s")
        task.cancel()
        await asyncio.wait([task])

    asyncio.run(scenario())


def test_looking_again_does_not_wait_for_the_interval(metrics: Readable) -> None:
    async def scenario() -> None:
        dependency = Dependency()
        checker = make(metrics, dependency, interval_s=3_600.0)
        task = asyncio.create_task(checker.run())
        await dependency.next_ping()
        dependency.error = UpstreamError(label="Connection error")
        checker.check_now("litellm")
        await dependency.next_ping()
        assert checker.health()["litellm"].error == "Connection error"
        assert dependency.pings == 2
        checker.check_now("unknown")
        task.cancel()
        await asyncio.wait([task])

    asyncio.run(scenario())


def test_an_old_result_is_not_believed(metrics: Readable) -> None:
    now = 100.0

    async def scenario() -> HealthChecker:
        dependency = Dependency()
        checker = HealthChecker(
            {"litellm": dependency.ping},
            HealthSchedule(interval_s=60.0, timeout_s=1.0, ttl_s=30.0, clock=lambda: now),
            metrics.instruments,
            TracerProvider(shutdown_on_exit=False).get_tracer("test"),
        )
        task = asyncio.create_task(checker.run())
        await dependency.next_ping()
        task.cancel()
        await asyncio.wait([task])
        return checker

    checker = asyncio.run(scenario())
    now = 129.0
    assert checker.health()["litellm"].up
    assert metrics.value("llmops.health.age", dependency="litellm") == 29.0
    now = 131.0
    health = checker.health()["litellm"]
    assert (health.up, health.error, health.age_s) == (False, "the last check is too old", 31.0)


def test_who_ask_at_once_wait_for_one_check_and_see_its_result(metrics: Readable) -> None:
    async def scenario() -> None:
        clock, dependency = FakeClock(100), Dependency()
        checker = HealthChecker(
            {"litellm": dependency.ping},
            HealthSchedule(interval_s=3_600, timeout_s=5, ttl_s=7_200, clock=clock),
            metrics.instruments,
            TracerProvider(shutdown_on_exit=False).get_tracer("test"),
        )
        task = asyncio.create_task(checker.run())
        await dependency.next_ping()
        clock.advance(FRESH_S)
        await checker.refresh({"litellm"})
        assert dependency.pings == 1
        dependency.error = UpstreamError(label="Connection error")
        clock.advance(0.1)
        await asyncio.gather(*(checker.refresh({"litellm"}) for _ in range(50)))
        assert checker.health()["litellm"].error == "Connection error"
        await asyncio.gather(*(checker.refresh({"litellm"}) for _ in range(50)))
        assert dependency.pings == 2
        task.cancel()
        await asyncio.wait([task])

    asyncio.run(scenario())


def test_who_asks_while_a_check_hangs_causes_no_other_and_waits_for_its_limit_only(metrics: Readable) -> None:
    async def scenario() -> None:
        clock, dependency = FakeClock(100), Dependency()
        checker = HealthChecker(
            {"litellm": dependency.ping},
            HealthSchedule(interval_s=3_600, timeout_s=0.2, ttl_s=7_200, clock=clock),
            metrics.instruments,
            TracerProvider(shutdown_on_exit=False).get_tracer("test"),
        )
        task = asyncio.create_task(checker.run())
        await dependency.next_ping()
        dependency.hangs = True
        clock.advance(2 * FRESH_S)
        dependency.asked.clear()
        # Whose result is not waited for is checked all the same.
        await asyncio.wait_for(checker.refresh(()), 0.1)
        await asyncio.wait_for(dependency.asked.wait(), 5)
        async with asyncio.timeout(5):
            await asyncio.gather(*(checker.refresh({"litellm"}) for _ in range(50)))
        assert checker.health()["litellm"].error == "no answer within 0.2 s"
        await asyncio.sleep(0.05)
        assert (dependency.pings, dependency.most_at_once) == (2, 1)
        task.cancel()
        await asyncio.wait([task])

    asyncio.run(scenario())


def test_without_the_checks_running_the_wait_ends_all_the_same(metrics: Readable) -> None:
    async def scenario() -> None:
        async with asyncio.timeout(5):
            await make(metrics, Dependency()).refresh({"litellm"})

    asyncio.run(scenario())
