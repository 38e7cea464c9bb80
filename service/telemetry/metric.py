"""How a metric is declared."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """One metric of our own.

    ``attributes`` maps each attribute to its closed set of values, or to a sentence where the set is known
    only at run time. ``buckets`` are a histogram's upper bounds.
    """

    name: str
    kind: Literal["counter", "up_down_counter", "gauge", "histogram"]
    unit: str
    description: str
    attributes: dict[str, tuple[str, ...] | str] = field(default_factory=dict)
    buckets: tuple[float, ...] = ()
