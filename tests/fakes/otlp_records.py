"""OTLP export requests as flat records that a test can read without walking three levels of messages."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.metrics.v1 import metrics_pb2
from opentelemetry.proto.trace.v1 import trace_pb2

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue


@dataclass(frozen=True)
class SpanEvent:
    """An event on a span."""

    name: str
    attributes: dict[str, Any]
    time_ns: int


@dataclass(frozen=True)
class SpanLink:
    """A span's link to another span."""

    trace_id: str
    span_id: str
    attributes: dict[str, Any]


@dataclass(frozen=True)
class Span:
    """A span; ids are hexadecimal, and the parent's is empty on a root."""

    name: str
    kind: str
    trace_id: str
    span_id: str
    parent_id: str
    attributes: dict[str, Any]
    events: list[SpanEvent]
    status: str
    status_message: str
    links: list[SpanLink]
    start_ns: int
    end_ns: int
    flags: int
    trace_state: str
    scope: str
    resource: dict[str, Any]


@dataclass(frozen=True)
class Log:
    """A log record; the ids are empty outside of a span."""

    body: Any
    severity: str
    severity_number: int
    event_name: str
    trace_id: str
    span_id: str
    attributes: dict[str, Any]
    scope: str
    resource: dict[str, Any]
    time_ns: int


@dataclass(frozen=True)
class Point:
    """A metric's data point; the value of a histogram or a summary is its sum."""

    name: str
    unit: str
    kind: str
    value: float
    attributes: dict[str, Any]
    exemplars: list[str]
    scope: str
    resource: dict[str, Any]
    time_ns: int
    temporality: str = ""
    monotonic: bool = False
    description: str = ""
    count: int = 0
    bounds: list[float] = field(default_factory=list)
    bucket_counts: list[int] = field(default_factory=list)


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind is None:
        return None
    if kind == "array_value":
        return [_value(item) for item in value.array_value.values]
    if kind == "kvlist_value":
        return _attributes(value.kvlist_value.values)
    return getattr(value, kind)


def _attributes(pairs: Iterable[KeyValue]) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def spans_in(payload: bytes) -> list[Span]:
    """Flatten a trace export request."""
    return [
        _span(span, scoped.scope.name, _attributes(group.resource.attributes))
        for group in ExportTraceServiceRequest.FromString(payload).resource_spans
        for scoped in group.scope_spans
        for span in scoped.spans
    ]


def _span(span: trace_pb2.Span, scope: str, resource: dict[str, Any]) -> Span:
    return Span(
        name=span.name,
        kind=trace_pb2.Span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"),
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        attributes=_attributes(span.attributes),
        events=[
            SpanEvent(item.name, _attributes(item.attributes), item.time_unix_nano) for item in span.events
        ],
        status=trace_pb2.Status.StatusCode.Name(span.status.code).removeprefix("STATUS_CODE_"),
        status_message=span.status.message,
        links=[
            SpanLink(item.trace_id.hex(), item.span_id.hex(), _attributes(item.attributes))
            for item in span.links
        ],
        start_ns=span.start_time_unix_nano,
        end_ns=span.end_time_unix_nano,
        flags=span.flags,
        trace_state=span.trace_state,
        scope=scope,
        resource=resource,
    )


def logs_in(payload: bytes) -> list[Log]:
    """Flatten a log export request."""
    return [
        Log(
            body=_value(record.body),
            severity=record.severity_text,
            severity_number=record.severity_number,
            event_name=record.event_name,
            trace_id=record.trace_id.hex(),
            span_id=record.span_id.hex(),
            attributes=_attributes(record.attributes),
            scope=scoped.scope.name,
            resource=_attributes(group.resource.attributes),
            time_ns=record.time_unix_nano,
        )
        for group in ExportLogsServiceRequest.FromString(payload).resource_logs
        for scoped in group.scope_logs
        for record in scoped.log_records
    ]


def points_in(payload: bytes) -> list[Point]:
    """Flatten a metric export request."""
    return [
        point
        for group in ExportMetricsServiceRequest.FromString(payload).resource_metrics
        for scoped in group.scope_metrics
        for metric in scoped.metrics
        for point in _points(metric, scoped.scope.name, _attributes(group.resource.attributes))
    ]


def _points(metric: metrics_pb2.Metric, scope: str, resource: dict[str, Any]) -> Iterator[Point]:
    kind = metric.WhichOneof("data")
    if kind is None:
        return
    data = getattr(metric, kind)
    for point in data.data_points:
        yield Point(
            name=metric.name,
            unit=metric.unit,
            kind=kind,
            value=_number(point),
            attributes=_attributes(point.attributes),
            # A summary has neither exemplars nor a temporality, a gauge has no temporality.
            exemplars=[exemplar.trace_id.hex() for exemplar in getattr(point, "exemplars", ())],
            scope=scope,
            resource=resource,
            time_ns=point.time_unix_nano,
            temporality=_temporality(data),
            monotonic=getattr(data, "is_monotonic", False),
            description=metric.description,
            count=getattr(point, "count", 0),
            bounds=list(getattr(point, "explicit_bounds", ())),
            bucket_counts=list(getattr(point, "bucket_counts", ())),
        )


def _number(point: Any) -> float:
    if isinstance(point, metrics_pb2.NumberDataPoint):
        return float(getattr(point, point.WhichOneof("value") or "as_int"))
    return float(point.sum)


def _temporality(data: Any) -> str:
    if not hasattr(data, "aggregation_temporality"):
        return ""
    name: str = metrics_pb2.AggregationTemporality.Name(data.aggregation_temporality)
    return name.removeprefix("AGGREGATION_TEMPORALITY_")
