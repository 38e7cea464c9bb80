"""The one retry of this service: a decorator over tenacity, with every decision in one function.

tenacity runs the loop (attempt, wait, attempt); ``_Judge.retries`` decides after each attempt whether there
is another one, and says so: one log line, one span event, one count.
"""

import asyncio
import functools
import logging
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec, TypeVar

from opentelemetry.semconv.attributes.error_attributes import ERROR_TYPE
from tenacity import AsyncRetrying, RetryCallState
from tenacity.stop import stop_never

from service.errors import CircuitOpenError, RateLimitError, ServiceError, UpstreamFailure
from service.telemetry import names
from service.telemetry.events import emit
from service.telemetry.instruments import Instruments
from service.utils.deadline import Deadline

SLICES = 10


@dataclass(slots=True)
class _Slice:
    number: int
    calls: int = 0
    retries: int = 0


class RetryBudget:
    """A bucket that calls fill and retries empty, over a sliding window.

    Within the window there are at most ``max(floor, ratio * calls)`` retries: the ratio bounds what a busy
    process adds to an upstream's load, the floor lets a quiet one retry at all (the scheme of Finagle's
    ``RetryBudget``). Counts are kept in ten slices of the window, so memory is bounded.

    Args:
        ratio: Retries for each call.
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
        """Count one call, which may be retried later."""
        self._current().calls += 1

    def take(self) -> bool:
        """Take one retry; False, and nothing taken, when there is none left."""
        current = self._current()
        calls = sum(entry.calls for entry in self._slices)
        retries = sum(entry.retries for entry in self._slices)
        if retries + 1 > max(self._floor, self._ratio * calls):
            return False
        current.retries += 1
        return True

    def give_back(self) -> None:
        """Give back a retry that was taken and not made after all."""
        current = self._current()
        current.retries = max(0, current.retries - 1)

    def _current(self) -> _Slice:
        number = int(self._clock() / self._slice_s)
        while self._slices and self._slices[0].number <= number - SLICES:
            self._slices.popleft()
        if not self._slices or self._slices[-1].number != number:
            self._slices.append(_Slice(number))
        return self._slices[-1]


OPEN = "the circuit breaker is open"
MIN_ATTEMPT_S = 0.05
"""An attempt with less time than this cannot finish, so it is not started."""

P = ParamSpec("P")
T = TypeVar("T")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RetryPolicy:
    """When there is another attempt.

    ``max_retries`` after the first attempt; before the n-th of them a wait of ``base_delay_s * 2**(n-1)``
    seconds, plus a random part of up to ``jitter`` times that.
    """

    max_retries: int = 3
    base_delay_s: float = 1.0
    jitter: float = 0.25


@dataclass
class Progress:
    """How far a call has come; filled in on the way.

    ``attempts`` is counted by the attempt itself, when it goes out to the upstream; ``waited_s`` is the time
    spent between attempts, ``ended`` why there was no further one (an outcome of ``llmops.retry.attempts``).
    """

    attempts: int = 0
    waited_s: float = 0.0
    ended: str = ""
    delay_s: float = 0.0
    error: Exception | None = None


Attempt = Callable[Concatenate[Progress, Deadline, P], Coroutine[Any, Any, T]]


def transient(error: BaseException) -> bool:
    """Whether another attempt may succeed where this one failed."""
    return isinstance(error, (UpstreamFailure, RateLimitError)) and error.retryable and error.transient


def retrying(  # noqa: PLR0913 - each is a seam or a part of the policy
    operation: str,
    policy: RetryPolicy,
    budget: RetryBudget,
    instruments: Instruments,
    *,
    hopeless: Callable[[], bool] = lambda: False,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    random_part: Callable[[], float] = random.random,
) -> Callable[[Attempt[P, T]], Attempt[P, T]]:
    """Make a decorator that retries a coroutine function within a deadline and a budget.

    The function's first two arguments are the call's ``Progress`` and its ``Deadline``. What comes out in the
    end is the result, or the last attempt's own error. A cancelled attempt or wait is not retried.

    Args:
        operation: The value of ``operation`` on ``llmops.retry.attempts``.
        policy: How often, and after which waits.
        budget: The process's; shared by all that retry the same upstream.
        instruments: Where attempts are counted.
        hopeless: Whether another attempt would be turned away (an open breaker); asked before each wait.
        sleep: Waits so many seconds.
        random_part: Between 0 and 1.
    """
    judge = _Judge(operation, policy, budget, instruments, hopeless, random_part)

    def decorate(attempt: Attempt[P, T]) -> Attempt[P, T]:
        @functools.wraps(attempt)
        async def call(progress: Progress, deadline: Deadline, /, *args: P.args, **kwargs: P.kwargs) -> T:
            loop = AsyncRetrying(
                retry=judge.retries,
                wait=lambda state: state.args[0].delay_s,
                stop=stop_never,
                sleep=sleep,
                reraise=True,
            )
            try:
                return await loop(attempt, progress, deadline, *args, **kwargs)
            except CircuitOpenError:
                # The breaker opened during this call, which ends with its own last error all the same.
                if progress.error is not None:
                    raise progress.error from None
                raise

        return call

    return decorate


class _Judge:
    """Decides after each attempt, and says what was decided."""

    def __init__(  # noqa: PLR0913, PLR0917 - made in one place only
        self,
        operation: str,
        policy: RetryPolicy,
        budget: RetryBudget,
        instruments: Instruments,
        hopeless: Callable[[], bool],
        random_part: Callable[[], float],
    ) -> None:
        self._operation = operation
        self._policy = policy
        self._budget = budget
        self._attempts = instruments.retry_attempts
        self._hopeless = hopeless
        self._random_part = random_part

    def retries(self, state: RetryCallState) -> bool:
        """Whether there is another attempt after this one; tenacity asks, after success too."""
        progress: Progress = state.args[0]
        deadline: Deadline = state.args[1]
        error = state.outcome.exception() if state.outcome else None
        if state.attempt_number == 1 and not isinstance(error, CircuitOpenError):
            # A call that the breaker turned away adds no load, so it earns no retry.
            self._budget.count_call()
        if error is None:
            self._succeeded(state.attempt_number)
            return False
        if not isinstance(error, Exception):
            return False
        name = error.name if isinstance(error, ServiceError) else "InternalError"
        if isinstance(error, CircuitOpenError):
            self._turned_away(state.attempt_number, deadline, progress)
            return False
        outcome, reason = self._decide(state.attempt_number, error, deadline, progress)
        progress.ended = outcome
        progress.error = error
        self._attempts.add(1, {"operation": self._operation, "outcome": outcome, ERROR_TYPE: name})
        if reason:
            self._say(state.attempt_number, error, outcome, reason, deadline, progress)
        return outcome == "retried"

    def _turned_away(self, number: int, deadline: Deadline, progress: Progress) -> None:
        """The breaker opened while this call waited: the retry was not made after all."""
        progress.ended = "not_retryable"
        if progress.error is not None:
            self._budget.give_back()
            self._say_over(number - 1, progress.error, "circuit_open", OPEN, deadline)

    def _decide(
        self, number: int, error: Exception, deadline: Deadline, progress: Progress
    ) -> tuple[str, str]:
        """The outcome, and the reason in words; no reason where a retry was out of the question."""
        if not transient(error):
            return "not_retryable", ""
        if self._hopeless():
            return "not_retryable", OPEN
        if number > self._policy.max_retries:
            return "exhausted", "no retries left"
        asked = getattr(error, "retry_after_s", None) or 0.0
        delay_s = max(self._policy.base_delay_s * 2 ** (number - 1), asked)
        progress.delay_s = delay_s * (1 + self._policy.jitter * self._random_part())
        if progress.delay_s + MIN_ATTEMPT_S > deadline.left_s:
            return "deadline", "the deadline comes first"
        if not self._budget.take():
            return "budget", "the retry budget is spent"
        progress.waited_s += progress.delay_s
        return "retried", "retry"

    def _succeeded(self, number: int) -> None:
        self._attempts.add(1, {"operation": self._operation, "outcome": "success"})
        if number > 1:
            emit(
                logger,
                names.EVENT_RETRY_SUCCEEDED,
                f"Attempt {number}: Success",
                {"attempts": number, "operation": self._operation},
            )

    def _say(  # noqa: PLR0913, PLR0917 - one decision has so many sides
        self,
        number: int,
        error: Exception,
        outcome: str,
        reason: str,
        deadline: Deadline,
        progress: Progress,
    ) -> None:
        name, label = (error.name, error.label) if isinstance(error, ServiceError) else ("InternalError", "")
        cause = (
            {names.ATTR_UPSTREAM_CAUSE: str(error.cause)}
            if isinstance(error, ServiceError) and error.cause
            else {}
        )
        logger.warning("Attempt %d: %s", number, label, extra={"attempt": number, "error": name, **cause})
        left_s = round(deadline.left_s, 3)
        if outcome == "retried":
            emit(
                logger,
                names.EVENT_RETRY_SCHEDULED,
                f"Retrying in {progress.delay_s:.1f}s...",
                {
                    ERROR_TYPE: name,
                    "operation": self._operation,
                    "attempt": number,
                    "delay_s": round(progress.delay_s, 3),
                    "remaining_s": left_s,
                },
                level=logging.WARNING,
            )
            return
        ended = outcome if outcome != "not_retryable" else "circuit_open"
        self._say_over(number, error, ended, reason, deadline)

    def _say_over(self, number: int, error: Exception, ended: str, reason: str, deadline: Deadline) -> None:
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
