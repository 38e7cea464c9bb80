"""A circuit breaker around each attempt: purgatory's state model, with time, probes and epochs added.

purgatory counts the failures and decides the transitions. This module adds a monotonic clock (purgatory
uses the wall clock) and a limit of one probe at a time (purgatory lets every waiting call through). It
ignores the results of calls that began in an earlier state, and results that say nothing about the upstream
(purgatory counts an excluded exception as a success, so that a cancelled probe would close the circuit).

``tests/contract/test_vendor_internals.py`` checks the parts of purgatory's model that are not documented.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, Literal

from purgatory.domain.model import Context

from service.errors import CircuitOpenError, UpstreamFailure
from service.telemetry import names
from service.telemetry.events import emit
from service.telemetry.instruments import Instruments

State = Literal["closed", "open", "half_open"]

STATES: Final[dict[str, State]] = {"closed": "closed", "opened": "open", "half-opened": "half_open"}
PROBE_RETRY_AFTER_S = 1.0
"""``Retry-After`` for calls that are rejected while a probe is in progress, whose duration is not known."""

logger = logging.getLogger(__name__)


class CircuitBreaker:
    """Opens after a number of consecutive failures, and lets one probe through after a timeout.

    All methods run on the event loop without suspending, so no lock is needed. ``state`` may be read from any
    thread.

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
        self.name = name
        self._timeout_s = timeout_s
        self._clock = clock
        self._transitions = instruments.breaker_transitions
        self._rejections = instruments.breaker_rejections
        # With this TTL purgatory's own timeout is always over, so that only the one measured here counts.
        self._model = Context(name, threshold, ttl=float("-inf"))
        self._opened_at = 0.0
        self._epoch = 0
        self._probing = False
        instruments.observe_breaker(name, lambda: self.state)

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

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Let one attempt pass, and count its result.

        Raises:
            CircuitOpenError: The breaker is open; ``retry_after_s`` says for how long.
        """
        match self.state:
            case "open":
                raise self._rejection(self._opened_at + self._timeout_s - self._clock())
            case "half_open" if self._probing:
                raise self._rejection(PROBE_RETRY_AFTER_S)
            case "half_open":
                self._apply(self._model.handle_new_request)
                self._probing = True
        epoch = self._epoch
        try:
            yield
        except BaseException as error:
            if epoch == self._epoch:
                self._probing = False
                if _is_failure(error):
                    failure = error
                    self._apply(lambda: self._model.handle_exception(failure))
            raise
        # A call that began in an earlier state says nothing about the current one.
        if epoch == self._epoch:
            self._probing = False
            self._apply(self._model.handle_end_request)

    def _rejection(self, retry_after_s: float) -> CircuitOpenError:
        self._rejections.add(1, {"breaker": self.name})
        emit(
            logger,
            names.EVENT_BREAKER_REJECTED,
            "Circuit breaker open: the upstream is not asked",
            level=logging.WARNING,
            fields={"breaker": self.name, "retry_after_s": round(retry_after_s, 3)},
        )
        return CircuitOpenError(retry_after_s=retry_after_s)

    def _apply(self, change: Callable[[], object]) -> None:
        """Apply a change to purgatory's model, and report a change of its state."""
        before = STATES[self._model.state]
        change()
        # The model collects messages for purgatory's message bus, which is not in use.
        self._model.messages.clear()
        after = STATES[self._model.state]
        if after == before:
            return
        self._epoch += 1
        self._probing = False
        failures = 0
        if after == "open":
            self._opened_at = self._clock()
            failures = self._model.threshold if before == "closed" else 1
        self._transitions.add(1, {"breaker": self.name, "to": after})
        emit(
            logger,
            names.EVENT_BREAKER_STATE_CHANGED,
            f"Circuit breaker {before} -> {after}",
            level=logging.INFO if after == "closed" else logging.WARNING,
            fields={"breaker": self.name, "from": before, "to": after, "failures": failures},
        )


def _is_failure(error: BaseException) -> bool:
    """Whether an error counts as a failure of the upstream.

    Callers' own errors (4xx), a disconnected caller, refused credentials of ours, and bugs do not.
    """
    return isinstance(error, UpstreamFailure) and error.retryable
