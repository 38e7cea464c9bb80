"""Counters that only add here: the SDK reads their sums when metrics are exported.

The SDK's own counters copy, sort and hash the attributes of each ``add``, and offer it as an exemplar. These
add to a dictionary. They have no exemplars; histograms keep theirs.
"""

import threading
from collections.abc import Iterator
from typing import Final

from opentelemetry.context import Context
from opentelemetry.metrics import CallbackOptions, Counter, Meter, Observation, UpDownCounter
from opentelemetry.util.types import AnyValue, Attributes

MAX_SERIES: Final = 2_000
"""How many sets of attributes a counter has: the SDK's limit. The rest is counted together."""

OVERFLOW: Final[frozenset[tuple[str, AnyValue]]] = frozenset({("otel.metric.overflow", True)})
"""The attributes of the rest, as the specification of the SDK names them."""


class _Tally:
    """Sums by set of attributes; thread-safe. Attributes have hashable values: text, numbers and booleans."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sums: dict[frozenset[tuple[str, AnyValue]], float] = {}

    def add(self, amount: float, attributes: Attributes = None, context: Context | None = None) -> None:  # noqa: ARG002
        """Count."""
        key: frozenset[tuple[str, AnyValue]] = frozenset(attributes.items()) if attributes else frozenset()
        sums = self._sums
        with self._lock:
            if key not in sums and len(sums) >= MAX_SERIES:
                key = OVERFLOW
            sums[key] = sums.get(key, 0) + amount

    def _observe(self, _options: CallbackOptions) -> Iterator[Observation]:
        with self._lock:
            sums = list(self._sums.items())
        for key, total in sums:
            yield Observation(total, dict(key))


class TallyCounter(_Tally, Counter):
    """A counter.

    Args:
        meter: Exports it as an observable counter.
        name: The metric's name; its unit and description follow.
    """

    def __init__(self, meter: Meter, name: str, unit: str = "", description: str = "") -> None:
        super().__init__()
        meter.create_observable_counter(name, [self._observe], unit, description)


class TallyUpDownCounter(_Tally, UpDownCounter):
    """A counter that also goes down, otherwise like ``TallyCounter``."""

    def __init__(self, meter: Meter, name: str, unit: str = "", description: str = "") -> None:
        super().__init__()
        meter.create_observable_up_down_counter(name, [self._observe], unit, description)
