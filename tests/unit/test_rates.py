"""Rates: what is allowed, when it comes free, and that the system's time does not matter."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import RateLimitError
from service.identity.principal import Principal
from service.services.rate_limit import RateLimiter
from service.utils.rates import MAX_EXACT_EVENTS, MIN_SWEEP_KEYS, Events, Rate
from tests.fakes.clock import FakeClock
from tests.unit.resilience import Readable

COUNTED = MAX_EXACT_EVENTS + 1
TWO_HOURS_S = 7_200


def run(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(scenario())


def test_an_event_comes_free_when_the_oldest_is_a_period_old() -> None:
    async def scenario() -> None:
        clock = FakeClock(1_000)
        rate = Rate("3/minute", clock)
        assert (rate.amount, rate.period_s) == (3, 60)
        for second in (0, 10, 10):
            clock.advance(second)
            assert await rate.test("x")
            assert await rate.hit("x")
        assert not await rate.test("x")
        assert not await rate.hit("x")
        window = await rate.window("x")
        assert (window.remaining, window.reset_s) == (0, 40)
        clock.advance(39.9)
        assert not await rate.hit("x")
        clock.advance(0.1)
        assert (await rate.window("x")).remaining == 1
        assert await rate.hit("x")
        assert not await rate.hit("x")
        assert (await rate.window("x")).reset_s == 10
        assert await rate.hit("another key")

    run(scenario)


def test_a_high_rate_is_approximated_by_two_counters() -> None:
    async def scenario() -> None:
        clock = FakeClock(6_000)
        rate = Rate(f"{COUNTED}/minute", clock)
        assert [await rate.hit("x") for _ in range(COUNTED)] == [True] * COUNTED
        assert not await rate.test("x")
        assert not await rate.hit("x")
        window = await rate.window("x")
        assert window.remaining == 0
        assert 0 <= window.reset_s <= 60
        # Half of the period before still counts.
        clock.advance(90)
        assert sum([await rate.hit("x") for _ in range(COUNTED)]) == pytest.approx(COUNTED / 2, abs=1)
        clock.advance(120)
        assert (await rate.window("x")).remaining == COUNTED

    run(scenario)


@pytest.mark.parametrize("amount", [5, COUNTED])
@pytest.mark.parametrize("by_s", [-TWO_HOURS_S, TWO_HOURS_S])
def test_a_change_of_the_systems_time_changes_nothing(
    metrics: Readable, monkeypatch: pytest.MonkeyPatch, amount: int, by_s: int
) -> None:
    """The time went two hours back, and callers were told to wait for 7,260 seconds."""

    async def scenario() -> None:
        limiter = RateLimiter(f"{amount}/minute", metrics.instruments)
        for _ in range(amount):
            await limiter.count(Principal("user", "user"))
        real = time.time
        monkeypatch.setattr(time, "time", lambda: real() + by_s)
        with pytest.raises(RateLimitError) as caught:
            await limiter.count(Principal("user", "user"))
        assert caught.value.retry_after_s is not None
        assert 1 <= caught.value.retry_after_s <= 60

    run(scenario)
    assert metrics.value("llmops.requests.rejected", reason="rate_limited") == 1


@given(
    st.integers(1, 4),
    st.lists(st.tuples(st.sampled_from("ab"), st.floats(0, 30, allow_nan=False)), max_size=60),
)
def test_no_moving_window_ever_holds_more_than_is_allowed(
    amount: int, events: list[tuple[str, float]]
) -> None:
    async def scenario() -> None:
        clock = FakeClock(50)
        rate = Rate(f"{amount}/minute", clock)
        taken: dict[str, list[float]] = {"a": [], "b": []}
        for key, pause_s in events:
            clock.advance(pause_s)
            inside = [moment for moment in taken[key] if moment > clock() - 60]
            assert await rate.test(key) == (len(inside) < amount)
            assert await rate.hit(key) == (len(inside) < amount)
            if len(inside) < amount:
                taken[key].append(clock())
            window = await rate.window(key)
            left = [moment for moment in taken[key] if moment > clock() - 60]
            assert window.remaining == amount - len(left)
            assert window.reset_s == pytest.approx(min(left) + 60 - clock())

    run(scenario)


@pytest.mark.parametrize("amount", [5, COUNTED])
def test_keys_whose_events_have_expired_take_no_memory(amount: int) -> None:
    async def scenario() -> None:
        clock = FakeClock(50)
        events = Events(clock)
        rate = Rate(f"{amount}/minute", clock, events)
        for number in range(20 * MIN_SWEEP_KEYS):
            clock.advance(1)
            assert await rate.hit(f"key{number}")
        assert len(events) <= 2 * MIN_SWEEP_KEYS

    run(scenario)
