"""Counters that only add here count what the SDK's own would, and are bounded as those are."""

import threading

import pytest
from opentelemetry.metrics import Counter, Meter, UpDownCounter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader, NumberDataPoint, Sum

from service.telemetry.tally import MAX_SERIES, TallyCounter, TallyUpDownCounter


def made(kind: type[TallyCounter | TallyUpDownCounter]) -> tuple[TallyCounter | TallyUpDownCounter, Sum]:
    """An instrument, after two attribute sets in each order were added to it, and what is exported of it."""
    reader = InMemoryMetricReader()
    counter = kind(MeterProvider([reader]).get_meter("test"), "calls", "{call}", "Calls")
    counter.add(1, {"a": "x", "b": "y"})
    counter.add(2, {"b": "y", "a": "x"})
    counter.add(4)
    return counter, exported(reader)


def exported(reader: InMemoryMetricReader) -> Sum:
    """The one metric's data."""
    data = reader.get_metrics_data()
    assert data is not None
    (metric,) = data.resource_metrics[0].scope_metrics[0].metrics
    assert (metric.name, metric.unit, metric.description) == ("calls", "{call}", "Calls")
    assert isinstance(metric.data, Sum)
    return metric.data


def series(data: Sum) -> dict[frozenset[tuple[str, object]], float]:
    """The values by attributes."""
    found: dict[frozenset[tuple[str, object]], float] = {}
    for point in data.data_points:
        assert isinstance(point, NumberDataPoint)
        found[frozenset((point.attributes or {}).items())] = point.value
    return found


@pytest.mark.parametrize("kind", [TallyCounter, TallyUpDownCounter])
def test_it_is_exported_as_a_sum_by_attributes_in_any_order(
    kind: type[TallyCounter | TallyUpDownCounter],
) -> None:
    counter, data = made(kind)
    assert isinstance(counter, Counter if kind is TallyCounter else UpDownCounter)
    assert data.is_monotonic is (kind is TallyCounter)
    assert series(data) == {frozenset({("a", "x"), ("b", "y")}): 3, frozenset(): 4}


def test_it_goes_down() -> None:
    reader = InMemoryMetricReader()
    counter = TallyUpDownCounter(MeterProvider([reader]).get_meter("test"), "calls", "{call}", "Calls")
    counter.add(3)
    counter.add(-3)
    assert series(exported(reader)) == {frozenset(): 0}


def test_what_is_over_the_limit_is_counted_together() -> None:
    reader = InMemoryMetricReader()
    counter = TallyCounter(MeterProvider([reader]).get_meter("test"), "calls", "{call}", "Calls")
    for number in range(MAX_SERIES + 5):
        counter.add(1, {"host": f"{number}"})
    counter.add(1, {"host": "0"})
    found = series(exported(reader))
    assert found[frozenset({("host", "0")})] == 2
    assert found[frozenset({("otel.metric.overflow", True)})] == 5
    assert sum(found.values()) == MAX_SERIES + 6


def test_threads_lose_nothing() -> None:
    reader = InMemoryMetricReader()
    meter: Meter = MeterProvider([reader]).get_meter("test")
    counter = TallyCounter(meter, "calls", "{call}", "Calls")

    def count() -> None:
        for number in range(5_000):
            counter.add(1, {"kind": f"{number % 3}"})

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        exported(reader)
    assert sum(series(exported(reader)).values()) == 20_000
