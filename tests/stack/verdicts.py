"""Ways in which a query's answer can agree with what callers saw."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from tests.stack.api import Labels, Values

FAIR = 0.05
"""``rate`` extrapolates to the window's ends: up to half a sample's distance for each series."""

SLACK = 0.001
"""A third of one request in five minutes, per second: a series that ends a moment after it began has few
samples to extrapolate from. One request more or less is three times that."""


def labels(**values: str) -> Labels:
    """Labels of one series."""
    return frozenset(values.items())


class Expected(Protocol):
    """What a query should answer."""

    def differences(self, got: Values) -> list[str]:
        """What is otherwise, one line each."""

    def shown(self) -> str:
        """The same for people."""


def show(values: Mapping[Labels, float | str]) -> str:
    """Write values down in one short line; zeros are left out when there is anything else."""
    written = {
        ",".join(value for _, value in sorted(key)): f"{value:.4g}"
        if isinstance(value, int | float)
        else value
        for key, value in values.items()
        if value
    }
    if not written:
        return "0" if values else "nothing"
    return "; ".join(f"{key}={value}" if key else value for key, value in sorted(written.items()))


@dataclass(frozen=True)
class Same:
    """These values, within a tolerance; every other series is 0."""

    values: Mapping[Labels, float]
    tolerance: float = FAIR
    slack: float = SLACK

    def differences(self, got: Values) -> list[str]:
        """What is otherwise."""
        if not got:
            return ["no data"]
        found = []
        for key in self.values.keys() | got.keys():
            wanted, is_ = self.values.get(key, 0.0), got.get(key, 0.0)
            if math.isnan(is_) or abs(wanted - is_) > self.tolerance * abs(wanted) + self.slack:
                found.append(f"{show({key: is_})} where {wanted:.4g} was expected")
        return found

    def shown(self) -> str:
        """The values."""
        return show(self.values)


@dataclass(frozen=True)
class Within:
    """Each of these series, and each value within its bounds; every other series is 0."""

    bounds: Mapping[Labels, tuple[float, float]]

    def differences(self, got: Values) -> list[str]:
        """What is otherwise."""
        found = [f"no {show({key: 1.0})}" for key in self.bounds.keys() - got.keys()]
        for key, value in got.items():
            low, high = self.bounds.get(key, (0.0, 0.0))
            if not low <= value <= high:
                found.append(f"{show({key: value})} is not within {low:.4g} and {high:.4g}")
        return found

    def shown(self) -> str:
        """The bounds."""
        return show({key: f"{low:.3g} to {high:.3g}" for key, (low, high) in self.bounds.items()})


@dataclass(frozen=True)
class AtLeast:
    """Each of these series with at least this value; others may be there."""

    floors: Mapping[Labels, float]

    def differences(self, got: Values) -> list[str]:
        """What is otherwise."""
        return [
            f"{show({key: got.get(key, 0.0)})} is below {floor:.4g}"
            for key, floor in self.floors.items()
            if not got.get(key, 0.0) >= floor * (1 - FAIR)
        ]

    def shown(self) -> str:
        """The floors."""
        return show({key: f"at least {floor:.3g}" for key, floor in self.floors.items()})
