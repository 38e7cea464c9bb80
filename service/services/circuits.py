"""Which model calls are let through: a circuit for each model and caller, and one for each model.

A caller whose calls to a model keep failing is turned away from that model, and nobody else is. Two callers
who are turned away at the same time show that the fault is the model's: then everybody is. A call counts
once, however often it was attempted. Whether LiteLLM can be reached at all is the business of a
``ConnectionBreaker`` around each attempt.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import cachetools

from service.errors import UNREACHABLE, UpstreamFailure
from service.services.circuit_breaker import Circuit, State, Verdict, verdict_on_call
from service.telemetry.instruments import Instruments
from service.telemetry.names import MODEL_BREAKER

CALLERS_TO_OPEN = 2
"""So many callers' own circuits for a model, open at the same time, open the model's."""

MAX_CALLERS = 1_024
MAX_MODELS = 256
MAX_MODELS_PER_CALLER = 32
"""Bounds of what is kept; a circuit exists from its first failure on. The least recently used one is
forgotten, a caller's before anybody else's."""


def verdict_on_model(error: BaseException | None) -> Verdict:
    """What the end of a call says about the model; without a connection, nothing."""
    if isinstance(error, UpstreamFailure) and error.cause in UNREACHABLE:
        return "unknown"
    return verdict_on_call(error)


class ModelCircuit(Circuit):
    """A circuit for a model: of one caller, or of everybody."""

    verdict = staticmethod(verdict_on_model)


@dataclass(frozen=True, slots=True)
class _Entered:
    circuit: ModelCircuit
    epoch: int
    probe: bool

    @classmethod
    def into(cls, circuit: ModelCircuit) -> Self:
        # Entering may change the state, and so the epoch.
        probe = circuit.enter()
        return cls(circuit, circuit.epoch, probe)


class Passage:
    """One call on its way through the circuits; made by ``Circuits.call``."""

    def __init__(self, entered: list[_Entered], turned_away: Callable[[], bool]) -> None:
        self._entered = entered
        self._turned_away = turned_away

    @property
    def last_attempt(self) -> bool:
        """Whether no further attempt may be made: the call is a probe, or a circuit has opened meanwhile."""
        return any(entered.probe for entered in self._entered) or self._turned_away()

    def answered(self) -> None:
        """Settle a probe: the first piece of a stream is there, and the rest may take minutes."""
        for entered in self._entered:
            if entered.probe:
                entered.circuit.leave(entered.epoch, None)


class Circuits:
    """The circuits of all models and callers.

    Args:
        threshold: Failed calls in a row that open a caller's circuit.
        timeout_s: Seconds until an open circuit lets one probe through.
        instruments: Counts transitions and rejections, and observes the states.
        known: Maps a model's name to the value that may stand on a metric.
        clock: Monotonic, in seconds.
    """

    def __init__(
        self,
        threshold: int,
        timeout_s: float,
        instruments: Instruments,
        known: Callable[[str], str],
        clock: Callable[[], float],
    ) -> None:
        self._threshold = threshold
        self._timeout_s = timeout_s
        self._instruments = instruments
        self._known = known
        self._clock = clock
        self._callers: cachetools.LRUCache[str, cachetools.LRUCache[str, ModelCircuit]] = cachetools.LRUCache(
            MAX_CALLERS
        )
        self._models: cachetools.LRUCache[str, ModelCircuit] = cachetools.LRUCache(MAX_MODELS)
        self.on_change: Callable[[str, str | None, State], None] = lambda _model, _caller, _state: None
        """Called when a circuit opens or closes by what this process has seen, with the model and the caller;
        None stands for everybody."""
        instruments.observe_open_callers(self._open_callers)

    def hear(self, model: str, caller: str | None, state: State) -> None:
        """Take over what another process has seen, as ``Circuit.hear`` does."""
        if caller is None:
            if state == "open":
                self._everybodys(model).hear(state)
            elif model in self._models:
                self._models[model].hear(state)
                for name, circuit in self._each():
                    if name == model:
                        circuit.hear(state)
            return
        own = self._own(model, caller)
        if own is None and state == "open":
            own = self._create(model, caller)
        if own is not None:
            own.hear(state)
            self._compare(model, own)

    @contextmanager
    def call(self, model: str, caller: str) -> Iterator[Passage]:
        """Let one call pass, retries included, and count how it ended.

        Raises:
            CircuitOpenError: The model is not asked for this caller, or for anybody.
        """
        circuits = self._circuits(model, caller)
        # All are asked before a probe's place is taken in one of them.
        for circuit in circuits:
            circuit.check()
        entered = [_Entered.into(circuit) for circuit in circuits]
        passage = Passage(entered, lambda: any(one.state == "open" for one in self._circuits(model, caller)))
        try:
            yield passage
        except BaseException as error:
            self._count(model, caller, entered, error)
            raise
        self._count(model, caller, entered, None)

    def _circuits(self, model: str, caller: str) -> list[ModelCircuit]:
        """The caller's circuit for the model and the model's own, as far as they exist."""
        found = (self._own(model, caller), self._models.get(model))
        return [circuit for circuit in found if circuit is not None]

    def _own(self, model: str, caller: str) -> ModelCircuit | None:
        circuits = self._callers.get(caller)
        return None if circuits is None else circuits.get(model)

    def _count(self, model: str, caller: str, entered: list[_Entered], error: BaseException | None) -> None:
        everybody = self._models.get(model)
        own = self._own(model, caller)
        epochs = {id(one.circuit): one.epoch for one in entered}
        if own is None and verdict_on_model(error) == "failure":
            own = self._create(model, caller)
        if own is not None:
            # Its first failure made it, while the call was under way.
            own.leave(epochs.get(id(own), 0), error)
        for one in entered:
            # The model's circuit counts its probes only; it is opened by callers' circuits.
            if one.circuit is everybody and one.probe:
                everybody.leave(one.epoch, error)
                if everybody.state == "closed":
                    self._close_callers(model)
        if own is not None:
            self._compare(model, own)

    def _compare(self, model: str, own: ModelCircuit) -> None:
        """Open the model's circuit where that of one more caller shows that the fault is the model's."""
        if own.state == "open" and self._open(model) >= CALLERS_TO_OPEN:
            self._everybodys(model).open()

    def _create(self, model: str, caller: str) -> ModelCircuit:
        circuits = self._callers.get(caller)
        if circuits is None:
            circuits = self._callers[caller] = cachetools.LRUCache(MAX_MODELS_PER_CALLER)
        circuit = circuits[model] = self._circuit(model, caller, self._threshold)
        return circuit

    def _circuit(self, model: str, caller: str | None, threshold: int) -> ModelCircuit:
        labels = {"breaker": MODEL_BREAKER, "model": self._known(model)}
        self._instruments.start_circuit_at_zero(labels)
        circuit = ModelCircuit(labels, threshold, self._timeout_s, self._instruments, self._clock)
        circuit.on_change = lambda state: self.on_change(model, caller, state)
        return circuit

    def _open(self, model: str) -> int:
        return sum(circuit.state == "open" for name, circuit in self._each() if name == model)

    def _each(self) -> Iterator[tuple[str, ModelCircuit]]:
        for circuits in list(self._callers.values()):
            yield from list(circuits.items())

    def _everybodys(self, model: str) -> ModelCircuit:
        circuit = self._models.get(model)
        if circuit is None:
            created = circuit = self._models[model] = self._circuit(model, None, 1)
            self._instruments.observe_breaker(circuit.labels, lambda: created.state)
        return circuit

    def _close_callers(self, model: str) -> None:
        for name, circuit in self._each():
            if name == model:
                circuit.close()

    def _open_callers(self) -> Mapping[str, int]:
        """How many callers' circuits are open, for each model that has one."""
        counts: dict[str, int] = {}
        for name, circuit in self._each():
            label = self._known(name)
            counts[label] = counts.get(label, 0) + (circuit.state == "open")
        return counts
