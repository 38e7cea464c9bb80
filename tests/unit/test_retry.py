"""Retry: how often, when, what ends it, and how it is said."""

import asyncio
import json

import pytest

from service.errors import (
    BadRequestError,
    CircuitOpenError,
    RateLimitError,
    UpstreamError,
    UpstreamTimeoutError,
)
from service.utils.deadline import Deadline
from service.utils.retry import Progress, RetryBudget, RetryPolicy, retrying, transient
from tests.fakes.clock import FakeClock
from tests.unit.resilience import Readable


class Call:
    """A call whose attempts end as scripted."""

    def __init__(  # noqa: PLR0913 - each is what a test varies
        self,
        metrics: Readable,
        *outcomes: Exception | str,
        limit_s: float = 30.0,
        floor: int = 10,
        took_s: float = 0.0,
        breaker_open: bool = False,
        random: float = 0.0,
    ) -> None:
        self.clock = FakeClock()
        self.progress = Progress()
        self.deadline = Deadline.after(limit_s, clock=self.clock)
        self._outcomes = list(outcomes)
        self._took_s = took_s
        self.run = retrying(
            "chat",
            RetryPolicy(sleep=self.clock.sleep, random_fraction=lambda: random),
            RetryBudget(0.2, floor, 10.0, self.clock),
            metrics.instruments,
            breaker_open=lambda: breaker_open,
        )(self._attempt)

    async def _attempt(self, progress: Progress, _deadline: Deadline) -> str:
        outcome = self._outcomes.pop(0)
        self.clock.advance(self._took_s)
        if isinstance(outcome, CircuitOpenError):
            raise outcome
        progress.attempts += 1
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def __call__(self) -> str:
        return asyncio.run(self.run(self.progress, self.deadline))


def failure() -> UpstreamError:
    return UpstreamError(label="HTTP 503")


def test_success_at_once_says_nothing(metrics: Readable, caplog: pytest.LogCaptureFixture) -> None:
    call = Call(metrics, "answer")
    assert call() == "answer"
    assert call.clock.slept == []
    assert caplog.messages == []
    assert metrics.value("llmops.retry.attempts", outcome="success") == 1


def test_waits_double_and_the_lines_come_in_order(
    metrics: Readable, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    call = Call(metrics, failure(), failure(), failure(), "answer")
    assert call() == "answer"
    assert call.clock.slept == [1.0, 2.0, 4.0]
    assert call.progress.attempts == 4
    assert call.progress.waited_s == 7.0
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "Attempt 1: HTTP 503"),
        ("WARNING", "Retrying in 1.0s..."),
        ("WARNING", "Attempt 2: HTTP 503"),
        ("WARNING", "Retrying in 2.0s..."),
        ("WARNING", "Attempt 3: HTTP 503"),
        ("WARNING", "Retrying in 4.0s..."),
        ("INFO", "Attempt 4: Success"),
    ]
    assert metrics.value("llmops.retry.attempts", outcome="retried", error__type="UpstreamError") == 3
    assert metrics.value("llmops.retry.attempts", outcome="success") == 1


def test_jitter_adds_up_to_a_quarter(metrics: Readable) -> None:
    call = Call(metrics, failure(), "answer", random=1.0)
    call()
    assert call.clock.slept == [1.25]


def test_three_retries_at_most_and_the_last_error_comes_out(
    metrics: Readable, caplog: pytest.LogCaptureFixture
) -> None:
    last = UpstreamTimeoutError(label="Timeout")
    call = Call(metrics, failure(), failure(), failure(), last, "never")
    with pytest.raises(UpstreamTimeoutError) as raised:
        call()
    assert raised.value is last
    assert call.progress.attempts == 4
    assert call.progress.ended == "exhausted"
    assert caplog.records[-1].levelname == "ERROR"
    assert caplog.messages[-1] == "Giving up after attempt 4: no retries left"
    assert json.loads(json.dumps(vars(caplog.records[-1]), default=str))["reason"] == "exhausted"
    assert metrics.value("llmops.retry.attempts", outcome="exhausted") == 1


@pytest.mark.parametrize(
    "error",
    [
        BadRequestError("Model 'x' not found"),
        UpstreamError("Our key is refused.", retryable=False),
        UpstreamError("No answer at all.", transient=False),
        ValueError("a bug"),
    ],
)
def test_what_is_not_transient_is_not_retried(
    metrics: Readable, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    call = Call(metrics, error, "never")
    with pytest.raises(type(error)):
        call()
    assert call.clock.slept == []
    assert caplog.messages == []
    assert metrics.value("llmops.retry.attempts", outcome="not_retryable") == 1


def test_a_retry_that_cannot_finish_before_the_deadline_is_not_started(
    metrics: Readable, caplog: pytest.LogCaptureFixture
) -> None:
    call = Call(metrics, failure(), failure(), failure(), "never", limit_s=4.0)
    with pytest.raises(UpstreamError):
        call()
    assert call.clock.slept == [1.0, 2.0]
    assert caplog.messages[-1] == "Giving up after attempt 3: the deadline comes first"
    assert metrics.value("llmops.retry.attempts", outcome="deadline") == 1


def test_attempts_spend_the_deadline_too(metrics: Readable) -> None:
    call = Call(metrics, failure(), "never", limit_s=5.0, took_s=4.5)
    with pytest.raises(UpstreamError):
        call()
    assert call.clock.slept == []
    assert call.progress.ended == "deadline"


@pytest.mark.parametrize(("asked_s", "waited_s"), [(0.2, 1.0), (5.0, 5.0)])
def test_retry_after_is_a_lower_bound_of_the_wait(metrics: Readable, asked_s: float, waited_s: float) -> None:
    call = Call(metrics, RateLimitError(retry_after_s=asked_s), "answer")
    call()
    assert call.clock.slept == [waited_s]


def test_retry_after_beyond_the_deadline_ends_the_call(metrics: Readable) -> None:
    call = Call(metrics, RateLimitError(retry_after_s=60.0), "never")
    with pytest.raises(RateLimitError):
        call()
    assert call.clock.slept == []
    assert metrics.value("llmops.retry.attempts", outcome="deadline") == 1


def test_the_budget_ends_the_call(metrics: Readable, caplog: pytest.LogCaptureFixture) -> None:
    call = Call(metrics, failure(), failure(), "never", floor=1)
    with pytest.raises(UpstreamError):
        call()
    assert call.clock.slept == [1.0]
    assert caplog.messages[-1] == "Giving up after attempt 2: the retry budget is spent"
    assert metrics.value("llmops.retry.attempts", outcome="budget") == 1


def test_an_open_breaker_ends_the_call_without_a_wait(metrics: Readable) -> None:
    call = Call(metrics, failure(), "never", breaker_open=True)
    with pytest.raises(UpstreamError):
        call()
    assert call.clock.slept == []
    assert call.progress.ended == "not_retryable"


def test_turned_away_by_the_breaker_in_the_middle_the_call_ends_with_its_own_error(
    metrics: Readable,
) -> None:
    own = failure()
    call = Call(metrics, own, CircuitOpenError(retry_after_s=9.0))
    with pytest.raises(UpstreamError) as raised:
        call()
    assert raised.value is own
    assert call.progress.attempts == 1


def test_turned_away_at_once_the_call_ends_with_the_breakers_error(metrics: Readable) -> None:
    call = Call(metrics, CircuitOpenError(retry_after_s=9.0))
    with pytest.raises(CircuitOpenError):
        call()
    assert call.progress.attempts == 0
    assert metrics.value("llmops.retry.attempts") == 0


def test_nothing_is_retried_once_the_caller_has_left(metrics: Readable) -> None:
    clock = FakeClock()
    attempts = 0
    waiting = asyncio.Event()

    async def wait_for_ever(_seconds: float) -> None:
        waiting.set()
        await asyncio.Event().wait()

    async def attempt(_progress: Progress, _deadline: Deadline) -> None:
        nonlocal attempts
        attempts += 1
        raise failure()

    run = retrying(
        "chat", RetryPolicy(sleep=wait_for_ever), RetryBudget(0.2, 10, 10.0, clock), metrics.instruments
    )(attempt)

    async def scenario() -> None:
        task = asyncio.create_task(run(Progress(), Deadline.after(30.0, clock=clock)))
        await waiting.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(scenario())
    assert attempts == 1


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (UpstreamError(), True),
        (UpstreamTimeoutError(), True),
        (RateLimitError(), True),
        (UpstreamError(transient=False), False),
        (UpstreamError(retryable=False), False),
        (CircuitOpenError(), False),
        (BadRequestError(), False),
        (asyncio.CancelledError(), False),
    ],
)
def test_transient(error: BaseException, *, expected: bool) -> None:
    assert transient(error) is expected


@pytest.mark.parametrize("error", [asyncio.CancelledError(), failure()])
def test_a_first_attempt_that_fails_or_is_left_earns_a_retry(metrics: Readable, error: BaseException) -> None:
    """It has loaded the upstream like one that succeeds."""
    budget = RetryBudget(1.0, 0, 10.0, FakeClock())

    async def attempt(_progress: Progress, _deadline: Deadline) -> None:
        raise error

    run = retrying("chat", RetryPolicy(max_retries=0), budget, metrics.instruments)(attempt)
    with pytest.raises(type(error)):
        asyncio.run(run(Progress(), Deadline.after(30.0, clock=FakeClock())))
    assert budget.take()
    assert not budget.take()
