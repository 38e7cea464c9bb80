"""Prometheus's HTTP API, as the proof asks it."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlencode
from urllib.request import urlopen

Labels = frozenset[tuple[str, str]]
Values = dict[Labels, float]


class QueryError(Exception):
    """What Prometheus says about a query that it does not take."""


@dataclass(frozen=True)
class Api:
    """A Prometheus server at this base URL."""

    url: str

    def get(self, path: str, **parameters: object) -> Any:
        """Ask one endpoint; the ``data`` of its answer."""
        try:
            with urlopen(f"{self.url}/api/v1/{path}?{urlencode(parameters)}", timeout=30) as answer:  # noqa: S310 - loopback
                return json.load(answer)["data"]
        except HTTPError as error:
            raise QueryError(error.read().decode()) from error

    def query(self, expr: str, at: float) -> Values:
        """One instant query; each series' value by its labels."""
        found = self.get("query", query=expr, time=at)
        if found["resultType"] == "scalar":
            return {frozenset(): float(found["result"][1])}
        return {_labels(one["metric"]): float(one["value"][1]) for one in found["result"]}

    def over(self, expr: str, start: float, end: float, step: float = 1) -> dict[Labels, dict[float, float]]:
        """One range query; each series' values by time."""
        found = self.get("query_range", query=expr, start=start, end=end, step=step)["result"]
        return {_labels(one["metric"]): {at: float(value) for at, value in one["values"]} for one in found}

    def exemplars(self, expr: str, start: float, end: float) -> list[dict[str, Any]]:
        """The exemplars of the series in a query, each with its series' labels."""
        found = self.get("query_exemplars", query=expr, start=start, end=end)
        return [{"series": one["seriesLabels"], **exemplar} for one in found for exemplar in one["exemplars"]]

    def names(self) -> set[str]:
        """The names of all series."""
        return set(self.get("label/__name__/values"))

    def wait_ready(self, limit_s: float = 60) -> None:
        """Wait until it answers queries."""
        until(self._ready, "Prometheus to answer", limit_s)

    def _ready(self) -> bool:
        try:
            self.query("vector(1)", time.time())
        except (URLError, QueryError, OSError):
            return False
        return True


def _labels(metric: dict[str, str]) -> Labels:
    return frozenset(metric.items())


def until(condition: Callable[[], object], what: str, limit_s: float = 60) -> None:
    """Wait until the condition holds."""
    end = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {limit_s} s for {what}")
        time.sleep(0.1)
