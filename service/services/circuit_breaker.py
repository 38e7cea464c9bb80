"""Stops asking an upstream that keeps failing: purgatory's state model, with what it lacks around it.

purgatory counts failures and decides the transitions. Around it stand here: a monotonic clock (purgatory's is
the wall clock), one probe at a time (purgatory lets every waiting caller through), results that count for the
state in which their call started, and calls that do not count at all (purgatory takes an excluded exception
for a success, which would close a half-open circuit after a cancelled probe).
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Final, Literal

from purgatory.domain.model import Context

from service.errors import CircuitOpenError, UpstreamFailure
from service.telemetry import names
from service.telemetry.events import emit
from service.telemetry.instruments import Instruments

State = Literal["closed", "open", "half_open"]

STATES: Final[dict[str, State]] = {"closed": "closed", "opened": "open", "half-opened": "half_open"}
PROBE_RETRY_AFTER_S = 1.0
"""What a caller is told while a probe is under way: its end is not known, and is rarely far."""

logger = logging.getLogger(__name__)


def counts(error: BaseException) -> bool:
    """Whether an error says that the upstream is in trouble.

    Callers' own errors (4xx), a caller who left, our credentials being refused and our bugs do not.
    """
    return isinstance(error, UpstreamFailure) and error.retryable


class CircuitBreaker:
    """Opens after so many failures in a row, and probes the upstream once its time-out is over.

    All of it runs on the event loop between two awaits, so no lock is needed; ``state`` may be read from any
    thread.

    Args:
        name: The value of ``breaker`` on metrics and events.
        threshold: Failures in a row that open it.
        timeout_s: Seconds that it stays open.
        instruments: Where transitions and rejections are counted, and its state is shown.
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
        # Open for no time at all in purgatory's own reckoning: the time-out is measured here.
        self._model = Context(name, threshold, ttl=float("-inf"))
        self._opened_at = 0.0
        self._epoch = 0
        self._probing = False
        instruments.show_breaker(name, lambda: self.state)

    @property
    def state(self) -> State:
        """The state now: half-open as soon as the time-out is over, whether anybody has called or not."""
        state = STATES[self._model.state]
        return "half_open" if state == "open" and self._remaining_s() <= 0 else state

    @property
    def rejects(self) -> bool:
        """Whether an attempt would be turned away now; for who has another way, and no error to report."""
        state = self.state
        return state == "open" or (state == "half_open" and self._probing)

    def _remaining_s(self) -> float:
        return self._opened_at + self._timeout_s - self._clock()

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Let one attempt pass, and learn from how it ends.

        Raises:
            CircuitOpenError: The upstream is not to be asked now; ``retry_after_s`` says when.
        """
        epoch = self._enter()
        try:
            yield
        except BaseException as error:
            if counts(error):
                self._leave(epoch, partial(self._model.handle_exception, error))
            else:
                self._leave(epoch, lambda: None)
            raise
        self._leave(epoch, self._model.handle_end_request)

    def _enter(self) -> int:
        match self.state:
            case "open":
                raise self._rejected(self._remaining_s())
            case "half_open" if self._probing:
                raise self._rejected(PROBE_RETRY_AFTER_S)
            case "half_open":
                self._step(self._model.handle_new_request)
                self._probing = True
        return self._epoch

    def _rejected(self, retry_after_s: float) -> CircuitOpenError:
        self._rejections.add(1, {"breaker": self.name})
        emit(
            logger,
            names.EVENT_BREAKER_REJECTED,
            "Circuit breaker open: the upstream is not asked",
            level=logging.WARNING,
            fields={"breaker": self.name, "retry_after_s": round(retry_after_s, 3)},
        )
        return CircuitOpenError(retry_after_s=retry_after_s)

    def _leave(self, epoch: int, learn: Callable[[], object]) -> None:
        # A call from before the last change of state says nothing about the state that is now.
        if epoch != self._epoch:
            return
        self._probing = False
        self._step(learn)

    def _step(self, change: Callable[[], object]) -> None:
        """Let purgatory's model take a step, and say so when that changed its state."""
        before = STATES[self._model.state]
        change()
        # The model collects messages for a bus that is not in use.
        self._model.messages.clear()
        after = STATES[self._model.state]
        if after == before:
            return
        self._epoch += 1
        self._probing = False
        if after == "open":
            self._opened_at = self._clock()
        failures = 0
        if after == "open":
            failures = self._model.threshold if before == "closed" else 1
        self._transitions.add(1, {"breaker": self.name, "to": after})
        emit(
            logger,
            names.EVENT_BREAKER_STATE_CHANGED,
            f"Circuit breaker {before} -> {after}",
            level=logging.INFO if after == "closed" else logging.WARNING,
            fields={"breaker": self.name, "from": before, "to": after, "failures": failures},
        )
