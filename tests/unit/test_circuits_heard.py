"""Circuits that open and close because another process says so."""

import pytest

from service.errors import CircuitOpenError, UpstreamError
from service.services.circuit_breaker import HEARD_EXTRA_S, Circuit, State
from service.services.circuits import Circuits
from tests.fakes.clock import FakeClock
from tests.unit.resilience import Readable

OPEN_S = 10.0
FAILURES = 3


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(100.0)


class Heard:
    """A circuit, and what it has told."""

    def __init__(self, metrics: Readable, clock: FakeClock) -> None:
        self.told: list[State] = []
        self.circuit = Circuit({"breaker": "litellm"}, FAILURES, OPEN_S, metrics.instruments, clock)
        self.circuit.on_change = self.told.append

    def fail(self) -> None:
        """Count a failed call."""
        self.circuit.enter()
        self.circuit.leave(self.circuit.epoch, UpstreamError())

    def succeed(self) -> None:
        """Count a call that succeeds."""
        self.circuit.enter()
        self.circuit.leave(self.circuit.epoch, None)


@pytest.fixture
def one(metrics: Readable, clock: FakeClock) -> Heard:
    return Heard(metrics, clock)


def test_a_circuit_tells_what_it_has_seen_and_not_what_it_has_heard(one: Heard, clock: FakeClock) -> None:
    one.circuit.hear("open")
    one.circuit.hear("closed")
    assert (one.told, one.circuit.state) == ([], "closed")
    for _ in range(FAILURES):
        one.fail()
    assert one.told == ["open"]
    clock.advance(OPEN_S)
    one.succeed()
    assert one.told == ["open", "closed"]


def test_the_process_that_has_seen_it_probes_first(one: Heard, clock: FakeClock) -> None:
    one.circuit.hear("open")
    clock.advance(OPEN_S + HEARD_EXTRA_S[0] - 0.01)
    assert one.circuit.rejects
    clock.advance(HEARD_EXTRA_S[1] - HEARD_EXTRA_S[0] + 0.01)
    assert one.circuit.state == "half_open"


def test_a_probe_that_fails_elsewhere_keeps_it_open(one: Heard, clock: FakeClock) -> None:
    one.circuit.hear("open")
    clock.advance(OPEN_S)
    one.circuit.hear("open")
    clock.advance(OPEN_S)
    assert one.circuit.state == "open"


def test_what_is_heard_does_not_end_a_probe(one: Heard, clock: FakeClock) -> None:
    one.circuit.hear("open")
    clock.advance(OPEN_S + HEARD_EXTRA_S[1])
    assert one.circuit.enter() is True
    one.circuit.hear("open")
    assert one.circuit.state == "half_open"
    one.circuit.leave(one.circuit.epoch, None)
    assert (one.circuit.state, one.told) == ("closed", ["closed"])


def test_that_another_one_has_closed_does_not_forget_failures(one: Heard) -> None:
    one.fail()
    one.circuit.hear("closed")
    for _ in range(FAILURES - 1):
        one.fail()
    assert one.circuit.state == "open"


class Models:
    """The circuits of all models, and what they have told."""

    def __init__(self, metrics: Readable, clock: FakeClock) -> None:
        self.told: list[tuple[str, str | None, State]] = []
        self.circuits = Circuits(FAILURES, OPEN_S, metrics.instruments, lambda name: name, clock)
        self.circuits.on_change = lambda *change: self.told.append(change)

    def is_let_through(self, model: str, caller: str) -> bool:
        """Make a call that succeeds; whether it is made."""
        try:
            with self.circuits.call(model, caller):
                return True
        except CircuitOpenError:
            return False

    def fail(self, model: str, caller: str) -> None:
        """Make as many calls as open a caller's circuit."""
        for _ in range(FAILURES):
            with pytest.raises(UpstreamError), self.circuits.call(model, caller):
                raise UpstreamError


def test_each_caller_is_told_apart_in_all_processes(metrics: Readable, clock: FakeClock) -> None:
    models = Models(metrics, clock)
    models.fail("demo", "anna")
    assert models.told == [("demo", "anna", "open")]
    models.circuits.hear("other", "anna", "open")
    assert [models.is_let_through(*call) for call in (("demo", "anna"), ("other", "anna"))] == [False, False]
    assert [models.is_let_through(*call) for call in (("demo", "bert"), ("other", "bert"))] == [True, True]
    models.circuits.hear("other", "anna", "closed")
    assert models.is_let_through("other", "anna")
    assert models.told == [("demo", "anna", "open")]


def test_callers_of_two_processes_show_that_the_fault_is_the_models(
    metrics: Readable, clock: FakeClock
) -> None:
    models = Models(metrics, clock)
    models.circuits.hear("demo", "anna", "open")
    assert models.is_let_through("demo", "cora")
    models.fail("demo", "bert")
    assert not models.is_let_through("demo", "cora")
    assert models.told == [("demo", "bert", "open"), ("demo", None, "open")]


def test_a_model_that_works_again_works_for_all_callers(metrics: Readable, clock: FakeClock) -> None:
    models = Models(metrics, clock)
    models.circuits.hear("demo", "anna", "open")
    models.circuits.hear("demo", None, "open")
    assert not models.is_let_through("demo", "bert")
    models.circuits.hear("demo", None, "closed")
    assert models.is_let_through("demo", "bert")
    assert models.is_let_through("demo", "anna")
    assert models.told == []


def test_what_was_never_there_is_not_made_to_be_closed(metrics: Readable, clock: FakeClock) -> None:
    models = Models(metrics, clock)
    models.circuits.hear("demo", "anna", "closed")
    models.circuits.hear("demo", None, "closed")
    assert models.is_let_through("demo", "anna")
    assert models.told == []
