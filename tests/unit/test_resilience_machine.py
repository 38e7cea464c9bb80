"""Breaker, retry and budget against a model, in any order of events."""

import asyncio
from contextlib import AbstractContextManager
from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from service.errors import BadRequestError, CircuitOpenError, UpstreamError
from service.services.circuit_breaker import CircuitBreaker
from service.utils.deadline import Deadline
from service.utils.retry import Progress, RetryBudget, RetryPolicy, retrying
from tests.fakes.clock import FakeClock
from tests.unit.resilience import Readable

THRESHOLD = 5
TIMEOUT_S = 30.0
# Unless it is the probe: see `finish`.
NOTHING_LEARNT = (BadRequestError, asyncio.CancelledError, KeyError)


@dataclass
class Running:
    """A call that has been let through."""

    context: AbstractContextManager[None]
    era: int
    probe: bool


class BreakerMachine(RuleBasedStateMachine):
    """The breaker beside the simplest thing that could be right."""

    def __init__(self) -> None:
        super().__init__()
        self.metrics = Readable()
        self.clock = FakeClock(1_000.0)
        self.breaker = CircuitBreaker("litellm", THRESHOLD, TIMEOUT_S, self.metrics.instruments, self.clock)
        self.running: list[Running] = []
        self.state = "closed"
        self.failures = 0
        self.opened_at = 0.0
        self.era = 0
        self.transitions = 0
        self.rejections = 0

    def expected_state(self) -> str:
        over = self.clock() >= self.opened_at + TIMEOUT_S
        return "half_open" if self.state == "open" and over else self.state

    def change(self, state: str) -> None:
        self.state = state
        self.era += 1
        self.transitions += 1
        self.failures = 0
        if state == "open":
            self.opened_at = self.clock()

    @precondition(lambda self: len(self.running) < 12)
    @rule()
    def start(self) -> None:
        expected = self.expected_state()
        probing = any(call.probe and call.era == self.era for call in self.running)
        context = self.breaker.attempt()
        if expected == "open" or (expected == "half_open" and probing):
            self.rejections += 1
            with pytest.raises(CircuitOpenError) as raised:
                context.__enter__()
            assert (raised.value.retry_after_s or 0) > 0
            return
        context.__enter__()
        if expected == "half_open" and self.state == "open":
            self.change("half_open")
        self.running.append(Running(context, self.era, expected == "half_open"))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), how=st.sampled_from(["success", "failure", *NOTHING_LEARNT]))
    def finish(self, data: st.DataObject, how: str | type[BaseException]) -> None:
        call = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        error = {"success": None, "failure": UpstreamError()}[how] if isinstance(how, str) else how()
        call.context.__exit__(type(error) if error else None, error, None)
        if call.era == self.era and call.probe and how is BadRequestError:
            # A probe that is refused for its own fault has found the upstream there.
            self.change("closed")
            return
        if call.era != self.era or not isinstance(how, str):
            return
        if how == "success":
            self.failures = 0
            if self.state == "half_open":
                self.change("closed")
        else:
            self.failures += 1
            if self.state == "half_open" or self.failures >= THRESHOLD:
                self.change("open")

    @rule(seconds=st.sampled_from([0.5, 10.0, 29.5, 30.0]))
    def time_passes(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @invariant()
    def the_state_is_the_models(self) -> None:
        assert self.breaker.state == self.expected_state()

    @invariant()
    def at_most_one_probe(self) -> None:
        assert sum(call.probe and call.era == self.era for call in self.running) <= 1

    def teardown(self) -> None:
        assert self.metrics.value("llmops.circuit_breaker.transitions") == self.transitions
        assert self.metrics.value("llmops.circuit_breaker.rejections") == self.rejections
        # Never stuck: whatever happened, a healthy upstream closes it again.
        for call in self.running:
            call.context.__exit__(asyncio.CancelledError, asyncio.CancelledError(), None)
        self.clock.advance(TIMEOUT_S)
        with self.breaker.attempt():
            pass
        assert self.breaker.state == "closed"
        self.metrics.close()


class RetryMachine(RuleBasedStateMachine):
    """Calls with retries through one breaker and one budget; every attempt is accounted for."""

    def __init__(self) -> None:
        super().__init__()
        self.metrics = Readable()
        self.clock = FakeClock(1_000.0)
        self.breaker = CircuitBreaker("litellm", THRESHOLD, TIMEOUT_S, self.metrics.instruments, self.clock)
        self.script: list[str] = []
        self.calls = self.attempts = self.retries = 0
        self.run_call = retrying(
            "chat",
            RetryPolicy(sleep=self.clock.sleep),
            RetryBudget(0.2, 10, 1e9, self.clock),
            self.metrics.instruments,
            breaker_open=lambda *_: self.breaker.state == "open",
        )(self._attempt)

    async def _attempt(self, progress: Progress, deadline: Deadline) -> None:
        with self.breaker.attempt():
            progress.attempts += 1
            self.attempts += 1
            outcome = self.script.pop(0) if self.script else "success"
            if outcome == "slow failure":
                self.clock.advance(min(20.0, deadline.left_s))
            if outcome == "refused":
                raise BadRequestError
            if outcome == "cancelled":
                raise asyncio.CancelledError
            if outcome != "success":
                raise UpstreamError(label="HTTP 500")

    @rule(
        script=st.lists(
            st.sampled_from(["failure", "failure", "slow failure", "refused", "cancelled", "success"]),
            max_size=6,
        )
    )
    def call(self, script: list[str]) -> None:
        self.script = list(script)
        progress = Progress()
        started = self.clock()

        async def one() -> None:
            try:
                await self.run_call(progress, Deadline.after(30.0, clock=self.clock))
            except (UpstreamError, BadRequestError, CircuitOpenError):
                pass
            except asyncio.CancelledError:
                assert "cancelled" in script

        asyncio.run(one())
        self.calls += 1
        self.retries += max(0, progress.attempts - 1)
        assert progress.attempts <= 4
        assert self.clock() - started <= 30.001

    @rule(seconds=st.sampled_from([1.0, 30.0]))
    def time_passes(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @invariant()
    def the_budget_holds(self) -> None:
        assert self.retries <= max(10, 0.2 * self.calls)

    def teardown(self) -> None:
        counted = self.metrics.value("llmops.retry.attempts")
        cancelled = self.attempts - counted
        assert 0 <= cancelled <= self.calls
        assert self.metrics.value("llmops.retry.attempts", outcome="retried") >= self.retries
        self.metrics.close()


BreakerMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
RetryMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestBreaker = BreakerMachine.TestCase
TestRetry = RetryMachine.TestCase
