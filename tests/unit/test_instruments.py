"""What is declared in ``names`` and what is made of it are the same."""

import itertools
from typing import Any

from opentelemetry.metrics import Counter, Histogram, UpDownCounter
from opentelemetry.sdk.metrics.export import (
    Gauge,
    HistogramDataPoint,
    InMemoryMetricReader,
    Metric,
    NumberDataPoint,
    Sum,
)
from opentelemetry.sdk.metrics.export import Histogram as HistogramData

from service.telemetry import names
from service.telemetry.instruments import Instruments
from service.telemetry.providers import SCOPE, Exporters, build_telemetry
from tests.harness import make_settings


def _instruments() -> tuple[Instruments, InMemoryMetricReader]:
    reader = InMemoryMetricReader()
    return build_telemetry(make_settings(), Exporters(metrics=reader)).instruments, reader


def _metrics(reader: InMemoryMetricReader) -> dict[str, Metric]:
    data = reader.get_metrics_data()
    assert data is not None
    return {
        metric.name: metric
        for scope in data.resource_metrics[0].scope_metrics
        if scope.scope.name == SCOPE
        for metric in scope.metrics
    }


def _series(metric: Metric) -> dict[frozenset[tuple[str, Any]], float]:
    found = {}
    for point in metric.data.data_points:
        assert isinstance(point, NumberDataPoint)
        found[frozenset((point.attributes or {}).items())] = point.value
    return found


def _after_use() -> dict[str, Metric]:
    """The metrics of our own scope after every instrument was used."""
    instruments, reader = _instruments()
    for name, instrument in vars(instruments).items():
        match instrument:
            case Counter() | UpDownCounter():
                instrument.add(1)
            case Histogram():
                instrument.record(1)
            case _:
                assert name.startswith("_"), f"this test does not know how to use {name}"
    instruments.observe_breaker({"breaker": "litellm"}, lambda: "open")
    instruments.observe_open_callers(lambda: {"demo": 1})
    instruments.observe_health(lambda: {"qdrant": (True, 1.0)})
    instruments.observe_recorder_queue(lambda: 1)
    instruments.observe_fallback(lambda: True)
    return _metrics(reader)


KINDS = {"counter": Sum, "up_down_counter": Sum, "gauge": Gauge, "histogram": HistogramData}


def test_each_declared_metric_has_an_instrument_and_each_instrument_is_declared() -> None:
    made = _after_use()
    assert set(made) == {metric.name for metric in names.METRICS}
    for declared in names.METRICS:
        metric = made[declared.name]
        assert (metric.unit, metric.description) == (declared.unit, declared.description)
        assert isinstance(metric.data, KINDS[declared.kind]), declared.name
        if isinstance(metric.data, Sum):
            assert metric.data.is_monotonic is (declared.kind == "counter"), declared.name


def test_a_histogram_has_the_declared_buckets() -> None:
    made = _after_use()
    for declared in names.METRICS:
        if declared.kind == "histogram":
            for point in made[declared.name].data.data_points:
                assert isinstance(point, HistogramDataPoint)
                assert tuple(point.explicit_bounds) == declared.buckets


def test_a_series_whose_attributes_are_known_exists_at_zero_from_the_start() -> None:
    _, reader = _instruments()
    made = _metrics(reader)
    for declared in names.METRICS:
        known = {name: values for name, values in declared.attributes.items() if name != "error.type"}
        if "counter" not in declared.kind or any(isinstance(values, str) for values in known.values()):
            continue
        expected = {
            frozenset(zip(known, values, strict=True)): 0.0 for values in itertools.product(*known.values())
        }
        assert _series(made[declared.name]) == expected, declared.name


def test_a_model_exists_at_zero_from_when_it_is_known() -> None:
    instruments, reader = _instruments()
    assert "llmops.llm.calls" not in _metrics(reader)
    instruments.start_model_at_zero("demo")
    made = _metrics(reader)
    outcomes = set(names.LLM_CALLS.attributes["outcome"]) - {"error"}
    assert _series(made["llmops.llm.calls"]) == {
        frozenset({("model", "demo"), ("outcome", outcome)}): 0 for outcome in outcomes
    }
    assert _series(made["llmops.llm.cost"]) == {frozenset({("model", "demo")}): 0}


def test_a_breaker_is_shown_in_exactly_one_state_that_is_read_each_time() -> None:
    instruments, reader = _instruments()
    now = "closed"
    instruments.observe_breaker({"breaker": "litellm"}, lambda: now)
    for now in ("closed", "open", "half_open"):
        assert _series(_metrics(reader)["llmops.circuit_breaker.state"]) == {
            frozenset({("breaker", "litellm"), ("state", state)}): int(state == now)
            for state in ("closed", "open", "half_open")
        }


def test_all_that_is_declared_is_listed_once() -> None:
    declared = {value.name for value in vars(names).values() if isinstance(value, names.Metric)}
    assert sorted(declared) == sorted(metric.name for metric in names.METRICS)
    events = {
        value for name, value in vars(names).items() if name.startswith("EVENT_") and isinstance(value, str)
    }
    assert sorted(events) == sorted(names.EVENTS)


def test_names_are_ours_and_hold_no_unit() -> None:
    for metric in names.METRICS:
        assert metric.name.startswith("llmops.")
        assert metric.name == metric.name.lower()
        assert metric.unit
        assert metric.description
        assert not metric.name.endswith(("_s", ".seconds", "_total"))
    for event in names.EVENTS:
        assert event.startswith("llmops.")


def test_error_names_on_metrics_are_those_that_answers_can_have() -> None:
    for metric in names.METRICS:
        assert metric.attributes.get("error.type", names.ERROR_NAMES) == names.ERROR_NAMES
