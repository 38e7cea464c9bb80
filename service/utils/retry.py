"""Retries with back-off: ``retrying`` decorates an attempt, within a deadline and a retry budget.

tenacity runs the loop of attempts and waits, from the first failure on. ``_Decider.should_retry`` decides
after each attempt whether there is another one, and reports the decision as a log line, a span event and a
count.
"""

import asyncio
import functools
import logging
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from opentelemetry.semconv.attributes.error_attributes import ERROR_TYPE
from tenacity import AsyncRetrying, RetryCallState
from tenacity.stop import stop_never

from service.errors import CallerLeftError, CircuitOpenError, RateLimitError, ServiceError, UpstreamFailure
from service.telemetry import names
from service.telemetry.events import emit, upstream_fields
from service.telemetry.instruments import Instruments
from service.utils.deadline import Deadline

MIN_ATTEMPT_S = 0.05
"""Minimum time left for an attempt; with less than this it could not finish."""

SLICES = 10
BREAKER_OPEN = "the circuit breaker is open"

P = ParamSpec("P")
T = TypeVar("T")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RetryPolicy:
    """How often to retry, and the back-off before each retry.

    The back-off before the n-th retry is ``base_delay_s * 2**(n-1)`` seconds, plus a random fraction of up to
    ``jitter`` of it.

    Args:
        max_retries: Maximum number of retries after the first attempt.
        base_delay_s: Back-off before the first retry, in seconds.
        jitter: Maximum random addition, as a fraction of the back-off.
        sleep: Waits for a number of seconds.
        random_fraction: Returns a random number between 0 and 1.
    """

    max_retries: int = 3
    base_delay_s: float = 1.0
    jitter: float = 0.25
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    random_fraction: Callable[[], float] = random.random


CANCELLED = "cancelled"
"""The error of an attempt that ended because nobody waits for it any more."""


@dataclass(frozen=True, slots=True)
class Tried:
    """An attempt that has ended.

    Args:
        started_s: When it began, in seconds on the clock of the call.
        ended_s: When it ended.
        error: The error's name; None where it succeeded.
        cause: Why the exchange failed below HTTP; a value of ``Cause``.
        status: The upstream's HTTP status; of a failure only.
    """

    started_s: float
    ended_s: float
    error: str | None = None
    cause: str | None = None
    status: int | None = None

    @classmethod
    def failed(cls, started_s: float, ended_s: float, error: BaseException) -> Self:
        """An attempt that ended with an error, of which the facts are kept: it holds on to much else."""
        if isinstance(error, (asyncio.CancelledError, CallerLeftError)):
            return cls(started_s, ended_s, CANCELLED)
        if not isinstance(error, ServiceError):
            return cls(started_s, ended_s, "InternalError")
        cause = None if error.cause is None else error.cause.value
        return cls(started_s, ended_s, error.name, cause, error.upstream_status)


@dataclass
class Progress:
    """The progress of one call through its attempts.

    Args:
        attempts: Attempts sent to the upstream; counted by the attempt itself.
        tried: The attempts that have ended, in their order; noted by the attempt itself.
        waits_s: The back-off after each attempt that was followed by one, in seconds.
        ended: Why there was no further attempt: an outcome of ``llmops.retry.attempts``.
        delay_s: The latest back-off, in seconds.
        error: The latest attempt's error.
    """

    attempts: int = 0
    tried: list[Tried] = field(default_factory=list)
    waits_s: list[float] = field(default_factory=list)
    ended: str = ""
    delay_s: float = 0.0
    error: Exception | None = None

    @property
    def waited_s(self) -> float:
        """Time spent between attempts, in seconds."""
        return sum(self.waits_s)


Attempt = Callable[Concatenate[Progress, Deadline, P], Coroutine[Any, Any, T]]


def transient(error: BaseException) -> bool:
    """Whether another attempt may succeed where this one failed."""
    return isinstance(error, (UpstreamFailure, RateLimitError)) and error.transient


def retrying(
    operation: str,
    policy: RetryPolicy,
    budget: "RetryBudget",
    instruments: Instruments,
    *,
    breaker_open: Callable[..., bool] = lambda *_: False,
) -> Callable[[Attempt[P, T]], Attempt[P, T]]:
    """Make a decorator that retries a coroutine function within a deadline and a budget.

    The function's first two arguments are the call's ``Progress`` and its ``Deadline``. The decorated
    function returns the result, or raises the error of the last attempt. A cancelled attempt or wait is not
    retried.

    Args:
        operation: The value of ``operation`` on ``llmops.retry.attempts``.
        policy: How often to retry, and the back-off.
        budget: The retry budget, shared by all calls to the same upstream.
        instruments: Counts the attempts.
        breaker_open: Whether the circuit breaker would reject another attempt; called before each wait, with
            the function's own arguments.
    """
    decider = _Decider(operation, policy, budget, instruments, breaker_open)

    def decorate(attempt: Attempt[P, T]) -> Attempt[P, T]:
        @functools.wraps(attempt)
        async def call(progress: Progress, deadline: Deadline, /, *args: P.args, **kwargs: P.kwargs) -> T:
            # Most calls end with the first attempt: the loop's own work would be a thirtieth of theirs.
            try:
                result = await attempt(progress, deadline, *args, **kwargs)
            except BaseException as error:  # noqa: BLE001 - raised again by the loop, unless it is retried
                failed = [error]
            else:
                decider.succeeded(1)
                return result

            async def again(
                progress: Progress, deadline: Deadline, /, *args: P.args, **kwargs: P.kwargs
            ) -> T:
                if failed:
                    raise failed.pop()
                return await attempt(progress, deadline, *args, **kwargs)

            loop = AsyncRetrying(
                retry=decider.should_retry,
                wait=lambda state: state.args[0].delay_s,
                stop=stop_never,
                sleep=policy.sleep,
                reraise=True,
            )
            try:
                return await loop(again, progress, deadline, *args, **kwargs)
            except CircuitOpenError:
                # Where the breaker opened during this call, the call ends with its own last error.
                if progress.error is not None:
                    raise progress.error from None
                raise

        return call

    return decorate


@dataclass
class _Slice:
    number: int
    calls: int = 0
    retries: int = 0


class RetryBudget:
    """Limits the retries of a process to a fraction of its calls, over a sliding window.

    Within a window at most ``max(floor, ratio * calls)`` retries are allowed, as in Finagle's
    ``RetryBudget``: the ratio bounds the additional load on an upstream, and the floor allows retries while
    there are few calls. The counts are kept in ten slices of the window, so memory is bounded.

    Args:
        ratio: Retries per call.
        floor: Retries that are always allowed within a window.
        window_s: Length of the window, in seconds.
        clock: Monotonic, in seconds.
    """

    def __init__(
        self, ratio: float, floor: int, window_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._ratio = ratio
        self._floor = floor
        self._slice_s = window_s / SLICES
        self._clock = clock
        self._slices: deque[_Slice] = deque(maxlen=SLICES)

    def count_call(self) -> None:
        """Count one call."""
        self._current().calls += 1

    def take(self) -> bool:
        """Take one retry from the budget; False where none is left."""
        current = self._current()
        calls = sum(entry.calls for entry in self._slices)
        retries = sum(entry.retries for entry in self._slices)
        if retries + 1 > max(self._floor, self._ratio * calls):
            return False
        current.retries += 1
        return True

    def give_back(self) -> None:
        """Return a retry that was taken but not made."""
        current = self._current()
        current.retries = max(0, current.retries - 1)

    def _current(self) -> _Slice:
        number = int(self._clock() / self._slice_s)
        while self._slices and self._slices[0].number <= number - SLICES:
            self._slices.popleft()
        if not self._slices or self._slices[-1].number != number:
            self._slices.append(_Slice(number))
        return self._slices[-1]


class _Decider:
    """Decides after each attempt whether there is another one, and reports the decision."""

    def __init__(
        self,
        operation: str,
        policy: RetryPolicy,
        budget: RetryBudget,
        instruments: Instruments,
        breaker_open: Callable[..., bool],
    ) -> None:
        self._operation = operation
        self._policy = policy
        self._budget = budget
        self._attempts = instruments.retry_attempts
        self._breaker_open = breaker_open

    def succeeded(self, number: int) -> None:
        """Count and report the success of an attempt."""
        self._attempts.add(1, {"operation": self._operation, "outcome": "success"})
        if number == 1:
            self._budget.count_call()
            return
        emit(
            logger,
            names.EVENT_RETRY_SUCCEEDED,
            f"Attempt {number}: Success",
            {"attempts": number, "operation": self._operation},
        )

    def should_retry(self, state: RetryCallState) -> bool:
        """Whether to make another attempt; tenacity calls this after each attempt of its loop."""
        progress: Progress = state.args[0]
        deadline: Deadline = state.args[1]
        number = state.attempt_number
        error = state.outcome.exception() if state.outcome else None
        if error is None:
            self.succeeded(number)
            return False
        if number == 1 and not isinstance(error, CircuitOpenError):
            # A call that the breaker rejected adds no load, so it earns no retries.
            self._budget.count_call()
        if not isinstance(error, Exception):
            return False
        if isinstance(error, CircuitOpenError):
            self._rejected(number, deadline, progress)
            return False
        outcome, reason = self._decide(state, error)
        progress.ended = outcome
        progress.error = error
        name, label = (error.name, error.label) if isinstance(error, ServiceError) else ("InternalError", "")
        self._attempts.add(1, {"operation": self._operation, "outcome": outcome, ERROR_TYPE: name})
        if not reason:
            return False
        fields: dict[str, object] = {"attempt": number, "error": name, **upstream_fields(error)}
        logger.warning("Attempt %d: %s", number, label, extra=fields)
        if outcome != "retried":
            ended = outcome if outcome != "not_retryable" else "circuit_open"
            self._report_end(number, error, ended, reason, deadline)
            return False
        emit(
            logger,
            names.EVENT_RETRY_SCHEDULED,
            f"Retrying in {progress.delay_s:.1f}s...",
            {
                ERROR_TYPE: name,
                "operation": self._operation,
                "attempt": number,
                "delay_s": round(progress.delay_s, 3),
                "remaining_s": round(deadline.left_s, 3),
            },
            level=logging.WARNING,
        )
        return True

    def _rejected(self, number: int, deadline: Deadline, progress: Progress) -> None:
        """Handle a retry that the breaker rejected, because it opened during the wait."""
        progress.ended = "not_retryable"
        if progress.error is not None:
            self._budget.give_back()
            self._report_end(number - 1, progress.error, "circuit_open", BREAKER_OPEN, deadline)

    def _decide(self, state: RetryCallState, error: Exception) -> tuple[str, str]:
        """Return the outcome, and its reason for the log; no reason where the error is not transient."""
        progress: Progress = state.args[0]
        deadline: Deadline = state.args[1]
        number = state.attempt_number
        if not transient(error):
            return "not_retryable", ""
        if self._breaker_open(*state.args[2:]):
            return "not_retryable", BREAKER_OPEN
        if number > self._policy.max_retries:
            return "exhausted", "no retries left"
        asked_s = (error.retry_after_s if isinstance(error, ServiceError) else None) or 0.0
        delay_s = max(self._policy.base_delay_s * 2 ** (number - 1), asked_s)
        progress.delay_s = delay_s * (1 + self._policy.jitter * self._policy.random_fraction())
        if progress.delay_s + MIN_ATTEMPT_S > deadline.left_s:
            return "deadline", "the deadline comes first"
        if not self._budget.take():
            return "budget", "the retry budget is spent"
        progress.waits_s.append(progress.delay_s)
        return "retried", "retry"

    def _report_end(self, number: int, error: Exception, ended: str, reason: str, deadline: Deadline) -> None:
        emit(
            logger,
            names.EVENT_RETRY_EXHAUSTED,
            f"Giving up after attempt {number}: {reason}",
            {
                ERROR_TYPE: error.name if isinstance(error, ServiceError) else "InternalError",
                "operation": self._operation,
                "attempts": number,
                "reason": ended,
                "remaining_s": round(deadline.left_s, 3),
            },
            level=logging.ERROR,
        )
