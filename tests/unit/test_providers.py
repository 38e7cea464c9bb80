"""What the providers of a process are made of: resource, limits, views, and ids in any case."""

import logging
import math
import os
import secrets
import threading
from importlib.metadata import version
from typing import Any

import pytest
from opentelemetry.sdk.metrics.export import HistogramDataPoint, InMemoryMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from service.config.settings import Settings
from service.telemetry import names
from service.telemetry.providers import Exporters, build_telemetry, exporters_from
from tests.harness import make_settings, memory_log_exporter
from tests.unit.conftest import Lines, Read


def _points(reader: InMemoryMetricReader) -> dict[str, list[Any]]:
    data = reader.get_metrics_data()
    return {
        metric.name: list(metric.data.data_points)
        for resource in (data.resource_metrics if data else ())
        for scope in resource.scope_metrics
        for metric in scope.metrics
    }


def test_without_an_endpoint_nothing_is_exported_and_nobody_complains(lines: Lines) -> None:
    before = set(threading.enumerate())
    settings = make_settings()
    assert exporters_from(settings) == Exporters()
    telemetry = build_telemetry(settings)
    lines.configure(provider=telemetry.logger_provider)
    with telemetry.tracer_provider.get_tracer("test").start_as_current_span("work") as span:
        telemetry.instruments.llm_calls.add(1, {"model": "demo", "outcome": "success"})
        logging.getLogger("test").info("said")

    assert telemetry.logger_provider is None
    # One that another test left may end in the meantime.
    assert set(threading.enumerate()) <= before
    assert span.get_span_context().is_valid
    (line,) = lines.all
    assert line["trace_id"] == f"{span.get_span_context().trace_id:032x}"
    assert telemetry.shutdown(1) is True


@pytest.mark.parametrize("disabled", [True, False])
def test_ids_are_valid_in_any_case(disabled: bool) -> None:  # noqa: FBT001 - pytest passes it by name
    telemetry = build_telemetry(make_settings(otel_sdk_disabled=disabled))
    tracer = telemetry.tracer_provider.get_tracer("test")
    with tracer.start_as_current_span("outer") as outer, tracer.start_as_current_span("inner") as inner:
        assert outer.get_span_context().is_valid
        assert inner.get_span_context().trace_id == outer.get_span_context().trace_id
        assert outer.is_recording() is not disabled


def test_disabled_means_no_exporter_whatever_the_endpoint_is(read: Read) -> None:
    settings = _valid(read, OTEL_SDK_DISABLED="true", OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9")
    assert exporters_from(settings) == Exporters()


def _valid(read: Read, **variables: str) -> Settings:
    report = read(**variables)
    assert report.settings is not None, report.errors
    return report.settings


def _resource(settings: Settings) -> dict[str, Any]:
    telemetry = build_telemetry(settings)
    return dict(telemetry.tracer_provider.resource.attributes)


def test_the_resource_says_who_this_process_is() -> None:
    resource = _resource(make_settings(environment="staging"))
    assert resource["service.name"] == "llmops-api"
    assert resource["service.namespace"] == "llmops"
    assert resource["service.version"] == version("llmops-api")
    assert resource["deployment.environment.name"] == "staging"
    assert resource["process.pid"] == os.getpid()
    assert resource["telemetry.sdk.name"] == "opentelemetry"
    assert resource["telemetry.sdk.version"] == version("opentelemetry-sdk")
    assert len(resource["service.instance.id"]) == 36


def test_two_processes_are_two_instances() -> None:
    settings = make_settings()
    ids = {_resource(settings)["service.instance.id"] for _ in range(2)}
    assert len(ids) == 2


def test_all_signals_have_the_same_resource() -> None:
    reader = InMemoryMetricReader()
    telemetry = build_telemetry(make_settings(), Exporters(InMemorySpanExporter(), reader))
    data = reader.get_metrics_data()
    assert data is not None
    assert telemetry.logger_provider is not None
    assert data.resource_metrics[0].resource == telemetry.tracer_provider.resource
    assert telemetry.logger_provider.resource == telemetry.tracer_provider.resource
    telemetry.shutdown(1)


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        ({"OTEL_SERVICE_NAME": "mine"}, "mine"),
        ({"OTEL_RESOURCE_ATTRIBUTES": "service.name=attribute"}, "attribute"),
        ({"OTEL_SERVICE_NAME": "mine", "OTEL_RESOURCE_ATTRIBUTES": "service.name=attribute"}, "mine"),
    ],
)
def test_the_standard_variables_name_the_service(read: Read, variables: dict[str, str], name: str) -> None:
    assert _resource(_valid(read, **variables))["service.name"] == name


def test_resource_attributes_from_outside_have_the_last_word(read: Read) -> None:
    given = (
        "service.namespace=theirs,service.version=9,service.instance.id=pod-1,"
        "deployment.environment.name=prod,team=a%20b"
    )
    resource = _resource(_valid(read, OTEL_RESOURCE_ATTRIBUTES=given, ENVIRONMENT="staging"))
    assert resource["service.namespace"] == "theirs"
    assert resource["service.version"] == "9"
    assert resource["service.instance.id"] == "pod-1"
    assert resource["deployment.environment.name"] == "prod"
    assert resource["team"] == "a b"
    assert resource["service.name"] == "llmops-api"


@pytest.mark.parametrize("instrument", ["http.server.request.duration", "http.client.request.duration"])
def test_http_durations_have_buckets_to_two_minutes(instrument: str) -> None:
    reader = InMemoryMetricReader()
    telemetry = build_telemetry(make_settings(), Exporters(metrics=reader))
    telemetry.meter_provider.get_meter("test").create_histogram(instrument, "s").record(100)
    (point,) = _points(reader)[instrument]
    assert isinstance(point, HistogramDataPoint)
    assert {10, 30, 60, 120} <= set(point.explicit_bounds)
    assert point.explicit_bounds[-1] == 120
    assert point.bucket_counts[-1] == 0


def test_the_resource_is_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exporters hash it for each span and log record, and the SDK makes a JSON text of it each time."""
    resource = build_telemetry(make_settings(), Exporters()).tracer_provider.resource
    same = Resource(dict(resource.attributes), resource.schema_url)
    assert (resource, hash(resource)) == (same, hash(same))
    monkeypatch.setattr("opentelemetry.sdk.resources.dumps", None)
    assert hash(resource) == hash(resource)


def test_the_response_size_is_dropped_and_others_are_not() -> None:
    reader = InMemoryMetricReader()
    telemetry = build_telemetry(make_settings(), Exporters(metrics=reader))
    meter = telemetry.meter_provider.get_meter("test")
    meter.create_histogram("http.server.response.body.size", "By").record(1)
    meter.create_histogram("http.server.request.body.size", "By").record(1)
    assert "http.server.response.body.size" not in _points(reader)
    assert "http.server.request.body.size" in _points(reader)


def test_measurements_inside_a_sampled_span_have_exemplars() -> None:
    reader = InMemoryMetricReader()
    telemetry = build_telemetry(make_settings(), Exporters(metrics=reader))
    with telemetry.tracer_provider.get_tracer("test").start_as_current_span("work") as span:
        telemetry.instruments.event_loop_lag.record(0.1)
    (point,) = _points(reader)["llmops.event_loop.lag"]
    assert [exemplar.trace_id for exemplar in point.exemplars] == [span.get_span_context().trace_id]


def test_the_sdks_own_metrics_are_there() -> None:
    reader = InMemoryMetricReader()
    telemetry = build_telemetry(make_settings(), Exporters(InMemorySpanExporter(), reader))
    telemetry.tracer_provider.get_tracer("test").start_span("work").end()
    assert {"otel.sdk.processor.span.queue.capacity", "otel.sdk.span.started"} <= set(_points(reader))
    telemetry.shutdown(1)


def test_what_nobody_reads_of_them_is_not_counted(lines: Lines) -> None:
    reader = InMemoryMetricReader()
    exporters = Exporters(InMemorySpanExporter(), reader, memory_log_exporter())
    telemetry = build_telemetry(make_settings(), exporters)
    lines.configure(provider=telemetry.logger_provider)
    with telemetry.tracer_provider.get_tracer("test").start_as_current_span("work"):
        logging.getLogger("test").info("said")
    points = _points(reader)
    assert "otel.sdk.processor.log.queue.capacity" in points
    assert not {"otel.sdk.span.live", "otel.sdk.log.created"} & set(points)
    telemetry.shutdown(1)


@pytest.mark.parametrize(("variable", "kept"), [(None, 2_048), ("100", 100)])
def test_a_spans_texts_are_cut(monkeypatch: pytest.MonkeyPatch, variable: str | None, kept: int) -> None:
    if variable is not None:
        monkeypatch.setenv("OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT", variable)
    spans = InMemorySpanExporter()
    telemetry = build_telemetry(make_settings(), Exporters(spans))
    text = secrets.token_hex(3_000)
    telemetry.tracer_provider.get_tracer("test").start_span("work", attributes={"text": text}).end()
    telemetry.shutdown(2)
    (span,) = spans.get_finished_spans()
    assert dict(span.attributes or {}) == {"text": text[:kept]}


def test_names_are_declared_with_buckets_in_order() -> None:
    for buckets in (names.HTTP_DURATION_BUCKETS, names.EVENT_LOOP_LAG.buckets):
        assert list(buckets) == sorted(set(buckets))
        assert all(math.isfinite(bound) for bound in buckets)
