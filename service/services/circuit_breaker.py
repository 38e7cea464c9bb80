"""A circuit breaker: purgatory's state model, with time, probes and epochs added.

purgatory counts the failures and decides the transitions. This module adds a monotonic clock (purgatory
uses the wall clock) and a limit of one probe at a time (purgatory lets every waiting call through). It
ignores the results of calls that began in an earlier state, and results that say nothing about the upstream
(purgatory counts an excluded exception as a success, so that a cancelled probe would close the circuit).

``tests/contract/test_vendor_internals.py`` checks the parts of purgatory's model that are not documented.
"""

import logging
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final, Literal

from purgatory.domain.model import Context

from service.errors import (
    UNREACHABLE,
    BadRequestError,
    CircuitOpenError,
    RateLimitError,
    UpstreamError,
    UpstreamFailure,
)
from service.telemetry import names
from service.telemetry.events import emit
from service.telemetry.instruments import Instruments

State = Literal["closed", "open", "half_open"]
Verdict = Literal["success", "failure", "answered", "unknown"]
"""What the end of a call says about the upstream. ``answered``: it refused the request, so it is there; this
settles a probe and counts for nothing else. ``unknown`` says nothing, and gives a probe's place back."""

STATES: Final[dict[str, State]] = {"closed": "closed", "opened": "open", "half-opened": "half_open"}
HEARD_EXTRA_S: Final = (0.5, 1.5)
"""Bounds of what another process's open circuit is open longer here, at random: that process probes first."""

PROBE_RETRY_AFTER_S = 1.0
"""``Retry-After`` for calls that are rejected while a probe is in progress, whose duration is not known."""

logger = logging.getLogger(__name__)


def verdict_on_call(error: BaseException | None) -> Verdict:
    """What the end of a call says about the upstream that should have answered it.

    A caller who left, refused credentials of ours and bugs say nothing.
    """
    match error:
        case None:
            return "success"
        case UpstreamFailure():
            return "failure" if error.retryable or error.transient else "unknown"
        case BadRequestError() | RateLimitError():
            return "answered"
        case _:
            return "unknown"


def verdict_on_connection(error: BaseException | None) -> Verdict:
    """What the end of an attempt says about the network: whether there was a connection at all."""
    match error:
        case None | BadRequestError() | RateLimitError():
            return "success"
        case UpstreamFailure():
            return "failure" if error.cause in UNREACHABLE else "success"
        case _:
            return "unknown"


class Circuit:
    """Opens after a number of consecutive failures, and lets one probe through after a timeout.

    All methods run on the event loop without suspending, so no lock is needed. ``state`` may be read from any
    thread.

    Args:
        labels: The attributes on metrics and events; ``breaker`` at least.
        threshold: Consecutive failures that open the circuit.
        timeout_s: Seconds until an open circuit becomes half-open.
        instruments: Counts transitions and rejections.
        clock: Monotonic, in seconds.
    """

    verdict: Callable[[BaseException | None], Verdict] = staticmethod(verdict_on_call)

    def __init__(
        self,
        labels: Mapping[str, str],
        threshold: int,
        timeout_s: float,
        instruments: Instruments,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.labels = dict(labels)
        self._threshold = threshold
        self._timeout_s = timeout_s
        self._clock = clock
        self._transitions = instruments.breaker_transitions
        self._rejections = instruments.breaker_rejections
        # With this TTL purgatory's own timeout is always over, so that only the one measured here counts.
        self._model = Context(labels["breaker"], threshold, ttl=float("-inf"))
        self._opened_at = 0.0
        self._probing = False
        self._hearing = False
        self.on_change: Callable[[State], None] = lambda _state: None
        """Called when the circuit opens or closes by what this process has seen."""
        self.epoch = 0
        """The number of state changes so far; a call's result counts in the state in which it began."""

    @property
    def state(self) -> State:
        """The current state. It becomes half-open when the timeout is over, without a call."""
        state = STATES[self._model.state]
        if state == "open" and self._clock() >= self._opened_at + self._timeout_s:
            return "half_open"
        return state

    @property
    def rejects(self) -> bool:
        """Whether a call would be rejected now; for callers that have an alternative."""
        state = self.state
        return state == "open" or (state == "half_open" and self._probing)

    def check(self) -> None:
        """Raise ``CircuitOpenError`` where a call would be rejected; ``retry_after_s`` says for how long."""
        if not self.rejects:
            return
        left_s = self._opened_at + self._timeout_s - self._clock()
        retry_after_s = left_s if self.state == "open" else PROBE_RETRY_AFTER_S
        self._rejections.add(1, self.labels)
        emit(
            logger,
            names.EVENT_BREAKER_REJECTED,
            "Circuit breaker open: the upstream is not asked",
            level=logging.WARNING,
            fields={**self.labels, "retry_after_s": round(retry_after_s, 3)},
        )
        raise CircuitOpenError(retry_after_s=retry_after_s)

    def enter(self) -> bool:
        """Begin a call that ``check`` permits; whether it is the probe of a half-open circuit."""
        if self.state != "half_open":
            return False
        self._apply(self._model.handle_new_request)
        self._probing = True
        return True

    def leave(self, epoch: int, error: BaseException | None) -> None:
        """Count the result of a call; ``epoch`` is the circuit's when the call began."""
        # A call that began in an earlier state says nothing about the current one.
        if epoch != self.epoch:
            return
        verdict = self.verdict(error)
        probing, self._probing = self._probing, False
        if error is not None and verdict == "failure":
            failure = error
            self._apply(lambda: self._model.handle_exception(failure))
        elif verdict == "success" or (verdict == "answered" and probing):
            self._apply(self._model.handle_end_request)

    def open(self) -> None:
        """Open a closed circuit, whatever its number of failures."""
        if self.state == "closed":
            for _ in range(self._threshold):
                self._apply(lambda: self._model.handle_exception(UpstreamError()))

    def close(self) -> None:
        """Close the circuit without a probe, because another one has shown that the upstream is there."""

        def begin_again() -> None:
            self._model = Context(self.labels["breaker"], self._threshold, ttl=float("-inf"))

        # Whoever hears of the other one closes this one too.
        self._hearing = True
        try:
            self._apply(begin_again)
        finally:
            self._hearing = False

    def hear(self, state: State) -> None:
        """Take over what another process has seen: its circuit has opened, again perhaps, or has closed."""
        if self._probing:
            # The result of this process's own probe is newer.
            return
        if state == "closed":
            if self.state != "closed":
                self.close()
            return
        self._hearing = True
        try:
            self.open()
        finally:
            self._hearing = False
        self._opened_at = self._clock() + random.uniform(*HEARD_EXTRA_S)  # noqa: S311 - no secret

    def _apply(self, change: Callable[[], object]) -> None:
        """Apply a change to purgatory's model, and report a change of its state."""
        before = STATES[self._model.state]
        change()
        # The model collects messages for purgatory's message bus, which is not in use.
        self._model.messages.clear()
        after = STATES[self._model.state]
        if after == before:
            return
        self.epoch += 1
        self._probing = False
        failures = 0
        if after == "open":
            self._opened_at = self._clock()
            failures = self._model.threshold if before == "closed" else 1
        self._transitions.add(1, {**self.labels, "to": after})
        emit(
            logger,
            names.EVENT_BREAKER_STATE_CHANGED,
            f"Circuit breaker {before} -> {after}",
            level=logging.INFO if after == "closed" else logging.WARNING,
            fields={**self.labels, "from": before, "to": after, "failures": failures},
        )
        if after != "half_open" and not self._hearing:
            self.on_change(after)


class CircuitBreaker(Circuit):
    """A circuit around each call to a dependency, whose state is observed as a gauge.

    Args:
        name: The value of ``breaker`` on metrics and events.
        threshold: Consecutive failures that open the breaker.
        timeout_s: Seconds until an open breaker becomes half-open.
        instruments: Counts transitions and rejections, and observes the state.
        clock: Monotonic, in seconds.
    """

    def __init__(
        self,
        name: str,
        threshold: int,
        timeout_s: float,
        instruments: Instruments,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__({"breaker": name}, threshold, timeout_s, instruments, clock)
        instruments.observe_breaker(self.labels, lambda: self.state)

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Let one attempt pass, and count its result.

        Raises:
            CircuitOpenError: The breaker is open; ``retry_after_s`` says for how long.
        """
        self.check()
        self.enter()
        epoch = self.epoch
        try:
            yield
        except BaseException as error:
            self.leave(epoch, error)
            raise
        self.leave(epoch, None)


class ConnectionBreaker(CircuitBreaker):
    """A breaker that counts connections which could not be made, and nothing that came after one was."""

    verdict = staticmethod(verdict_on_connection)
