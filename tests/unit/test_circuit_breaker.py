"""The breaker: when it opens, what it lets through, and what it never forgets."""

import asyncio

import pytest

from service.errors import BadRequestError, CircuitOpenError, RateLimitError, UpstreamError
from service.services.circuit_breaker import CircuitBreaker
from tests.fakes.clock import FakeClock
from tests.unit.resilience import Readable


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(1_000.0)


@pytest.fixture
def breaker(metrics: Readable, clock: FakeClock) -> CircuitBreaker:
    return CircuitBreaker("litellm", 5, 30.0, metrics.instruments, clock)


def run(breaker: CircuitBreaker, error: BaseException | None = None) -> None:
    """Make one call that ends so."""
    if error is None:
        with breaker.attempt():
            return
    with pytest.raises(type(error)), breaker.attempt():
        raise error


def state(breaker: CircuitBreaker) -> str:
    return breaker.state


def fail(breaker: CircuitBreaker, times: int = 1) -> None:
    for _ in range(times):
        run(breaker, UpstreamError())


def test_opens_after_five_failures_in_a_row_and_turns_calls_away(
    breaker: CircuitBreaker, metrics: Readable, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    fail(breaker, 4)
    assert state(breaker) == "closed"
    fail(breaker)
    assert state(breaker) == "open"
    assert caplog.messages == ["Circuit breaker closed -> open"]
    clock.advance(10.0)
    with pytest.raises(CircuitOpenError) as raised:
        run(breaker)
    assert raised.value.retry_after_s == 20.0
    assert metrics.value("llmops.circuit_breaker.rejections", breaker="litellm") == 1
    assert metrics.value("llmops.circuit_breaker.transitions", to="open") == 1
    assert metrics.value("llmops.circuit_breaker.state", state="open") == 1
    assert metrics.value("llmops.circuit_breaker.state", state="closed") == 0


def test_a_success_starts_the_count_again(breaker: CircuitBreaker) -> None:
    fail(breaker, 4)
    run(breaker)
    fail(breaker, 4)
    assert state(breaker) == "closed"


@pytest.mark.parametrize(
    "error",
    [
        BadRequestError(),
        RateLimitError(),
        UpstreamError("Our key is refused.", retryable=False),
        ValueError("a bug"),
        asyncio.CancelledError(),
        GeneratorExit(),
    ],
)
def test_what_does_not_count_neither_adds_nor_resets(breaker: CircuitBreaker, error: BaseException) -> None:
    fail(breaker, 4)
    run(breaker, error)
    assert state(breaker) == "closed"
    fail(breaker)
    assert state(breaker) == "open"


def test_half_open_is_computed_not_waited_for(
    breaker: CircuitBreaker, clock: FakeClock, metrics: Readable
) -> None:
    fail(breaker, 5)
    clock.advance(29.9)
    assert state(breaker) == "open"
    clock.advance(0.1)
    assert state(breaker) == "half_open"
    assert metrics.value("llmops.circuit_breaker.state", state="half_open") == 1


def test_exactly_one_probe_whatever_the_number_of_callers(breaker: CircuitBreaker, clock: FakeClock) -> None:
    fail(breaker, 5)
    clock.advance(30.0)
    with breaker.attempt():
        for _ in range(50):
            with pytest.raises(CircuitOpenError) as raised:
                run(breaker)
            assert (raised.value.retry_after_s or 0) > 0
    assert state(breaker) == "closed"
    run(breaker)


def test_a_failed_probe_opens_again_for_the_whole_time(breaker: CircuitBreaker, clock: FakeClock) -> None:
    fail(breaker, 5)
    clock.advance(30.0)
    fail(breaker)
    assert state(breaker) == "open"
    clock.advance(29.0)
    with pytest.raises(CircuitOpenError):
        run(breaker)
    clock.advance(1.0)
    run(breaker)
    assert state(breaker) == "closed"


@pytest.mark.parametrize("error", [asyncio.CancelledError(), KeyError("a bug")])
def test_a_probe_that_says_nothing_gives_its_place_back(
    breaker: CircuitBreaker, clock: FakeClock, error: BaseException
) -> None:
    fail(breaker, 5)
    clock.advance(30.0)
    run(breaker, error)
    assert state(breaker) == "half_open"
    run(breaker)
    assert state(breaker) == "closed"


@pytest.mark.parametrize("error", [BadRequestError(), RateLimitError()])
def test_a_probe_that_the_upstream_refuses_shows_that_it_is_there(
    breaker: CircuitBreaker, clock: FakeClock, error: BaseException
) -> None:
    fail(breaker, 5)
    clock.advance(30.0)
    run(breaker, error)
    assert state(breaker) == "closed"


def test_a_slow_call_from_before_says_nothing_about_now(breaker: CircuitBreaker, clock: FakeClock) -> None:
    slow_failure, slow_success, slow_cancel = (breaker.attempt() for _ in range(3))
    for slow in (slow_failure, slow_success, slow_cancel):
        slow.__enter__()
    fail(breaker, 5)
    slow_success.__exit__(None, None, None)
    assert state(breaker) == "open"
    clock.advance(30.0)
    probe = breaker.attempt()
    probe.__enter__()
    cancelled = asyncio.CancelledError()
    assert not slow_cancel.__exit__(type(cancelled), cancelled, None)
    with pytest.raises(CircuitOpenError):
        run(breaker)
    probe.__exit__(None, None, None)
    assert state(breaker) == "closed"
    late = UpstreamError()
    assert not slow_failure.__exit__(UpstreamError, late, None)
    fail(breaker, 4)
    assert state(breaker) == "closed"


def test_transitions_are_said_once_each(
    breaker: CircuitBreaker, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    fail(breaker, 5)
    clock.advance(30.0)
    fail(breaker)
    clock.advance(30.0)
    run(breaker)
    assert [(r.levelname, r.getMessage(), vars(r)["failures"]) for r in caplog.records] == [
        ("WARNING", "Circuit breaker closed -> open", 5),
        ("WARNING", "Circuit breaker open -> half_open", 0),
        ("WARNING", "Circuit breaker half_open -> open", 1),
        ("WARNING", "Circuit breaker open -> half_open", 0),
        ("INFO", "Circuit breaker half_open -> closed", 0),
    ]
