"""Declarations of the standard metrics that the service emits, and of the collector's own metrics.

Names come from the semantic-convention packages. No package has the collector's names; `make stack-test`
finds them on the real collector.
"""

from typing import Final

from opentelemetry.semconv._incubating.metrics import gen_ai_metrics, otel_metrics
from opentelemetry.semconv._incubating.metrics.http_metrics import HTTP_SERVER_REQUEST_BODY_SIZE
from opentelemetry.semconv.attributes.error_attributes import ERROR_TYPE
from opentelemetry.semconv.attributes.http_attributes import HTTP_RESPONSE_STATUS_CODE, HTTP_ROUTE
from opentelemetry.semconv.metrics import http_metrics

from service.errors import CallerLeftError
from service.telemetry.names import ERROR_NAMES, HTTP_DURATION_BUCKETS, LLM_PROVIDER, OTHER_MODEL, Metric

_ANY: Final = "any"
_DROPPED: Final = "the reason of a drop"
MODEL: Final = "gen_ai.request.model"
TOKEN_TYPE: Final = "gen_ai.token.type"  # noqa: S105 - a kind of token, not a secret
OPERATION: Final = "gen_ai.operation.name"

REQUEST_ERRORS: Final = (*ERROR_NAMES, CallerLeftError.__name__, "503")
"""The values of ``error.type`` for a request; the health route answers 503 without an error."""

ATTEMPT_ERRORS: Final = (*ERROR_NAMES, "cancelled")
"""The values of ``error.type`` for a call of a model, and for one attempt at it."""

STATUSES: Final = ("500", "502", "503", "504")

SERVER_DURATION: Final = Metric(
    http_metrics.HTTP_SERVER_REQUEST_DURATION,
    "histogram",
    "s",
    "Duration of requests, by route, status and error",
    {
        HTTP_ROUTE: _ANY,
        HTTP_RESPONSE_STATUS_CODE: _ANY,
        ERROR_TYPE: REQUEST_ERRORS,
        "http.request.method": _ANY,
        "url.scheme": _ANY,
        "network.protocol.version": _ANY,
    },
    buckets=HTTP_DURATION_BUCKETS,
)
SERVER_ACTIVE: Final = Metric(
    "http.server.active_requests",
    "up_down_counter",
    "{request}",
    "Requests in progress, health routes included",
    {"http.request.method": _ANY, "url.scheme": _ANY},
)
SERVER_BODY_SIZE: Final = Metric(
    HTTP_SERVER_REQUEST_BODY_SIZE,
    "histogram",
    "By",
    "Size of the bodies of requests",
    {
        HTTP_ROUTE: _ANY,
        HTTP_RESPONSE_STATUS_CODE: _ANY,
        ERROR_TYPE: STATUSES,
        "http.request.method": _ANY,
        "url.scheme": _ANY,
        "network.protocol.version": _ANY,
    },
)
CLIENT_DURATION: Final = Metric(
    http_metrics.HTTP_CLIENT_REQUEST_DURATION,
    "histogram",
    "s",
    "Answered requests to LiteLLM and Qdrant",
    {
        HTTP_RESPONSE_STATUS_CODE: _ANY,
        ERROR_TYPE: _ANY,
        "http.request.method": _ANY,
        "server.address": _ANY,
        "server.port": _ANY,
        "network.protocol.version": _ANY,
    },
    buckets=HTTP_DURATION_BUCKETS,
)
_MODEL_CALL: Final[dict[str, tuple[str, ...] | str]] = {
    MODEL: f"as on llmops.llm.calls, else {OTHER_MODEL}",
    OPERATION: _ANY,
    "gen_ai.provider.name": (LLM_PROVIDER,),
    "server.address": _ANY,
    "server.port": _ANY,
}
GEN_AI_DURATION: Final = Metric(
    gen_ai_metrics.GEN_AI_CLIENT_OPERATION_DURATION,
    "histogram",
    "s",
    "Duration of attempts at a model",
    {**_MODEL_CALL, "gen_ai.response.model": _ANY, ERROR_TYPE: ATTEMPT_ERRORS},
)
GEN_AI_TOKENS: Final = Metric(
    gen_ai_metrics.GEN_AI_CLIENT_TOKEN_USAGE,
    "histogram",
    "{token}",
    "Tokens of answered attempts",
    {**_MODEL_CALL, "gen_ai.response.model": _ANY, TOKEN_TYPE: ("input", "output")},
)
GEN_AI_FIRST_CHUNK: Final = Metric(
    gen_ai_metrics.GEN_AI_CLIENT_OPERATION_TIME_TO_FIRST_CHUNK,
    "histogram",
    "s",
    "Time to the first chunk of streamed attempts",
    _MODEL_CALL,
)
GEN_AI_NEXT_CHUNK: Final = Metric(
    gen_ai_metrics.GEN_AI_CLIENT_OPERATION_TIME_PER_OUTPUT_CHUNK,
    "histogram",
    "s",
    "Time between the chunks of streamed attempts",
    _MODEL_CALL,
)


_COMPONENT: Final = {"otel.component.name": _ANY, "otel.component.type": _ANY}
_EXPORTER: Final = {**_COMPONENT, "server.address": _ANY, "server.port": _ANY}


def _sdk(name: str, kind: str, unit: str, description: str, *, drops: bool = False) -> Metric:
    attributes: dict[str, tuple[str, ...] | str] = {**(_EXPORTER if ".exporter." in name else _COMPONENT)}
    if drops:
        attributes[ERROR_TYPE] = _DROPPED
    return Metric(name, "counter" if kind == "counter" else "up_down_counter", unit, description, attributes)


SDK_SPANS: Final = _sdk(
    otel_metrics.OTEL_SDK_PROCESSOR_SPAN_PROCESSED,
    "counter",
    "{span}",
    "Spans that left the queue",
    drops=True,
)
SDK_LOGS: Final = _sdk(
    otel_metrics.OTEL_SDK_PROCESSOR_LOG_PROCESSED,
    "counter",
    "{log_record}",
    "Log records that left the queue",
    drops=True,
)
SDK_SPAN_QUEUE: Final = _sdk(
    otel_metrics.OTEL_SDK_PROCESSOR_SPAN_QUEUE_SIZE, "gauge", "{span}", "Spans waiting for export"
)
SDK_LOG_QUEUE: Final = _sdk(
    otel_metrics.OTEL_SDK_PROCESSOR_LOG_QUEUE_SIZE,
    "gauge",
    "{log_record}",
    "Log records waiting for export",
)
SDK_SPAN_QUEUE_CAPACITY: Final = _sdk(
    otel_metrics.OTEL_SDK_PROCESSOR_SPAN_QUEUE_CAPACITY, "gauge", "{span}", "Capacity of the span queue"
)
SDK_LOG_QUEUE_CAPACITY: Final = _sdk(
    otel_metrics.OTEL_SDK_PROCESSOR_LOG_QUEUE_CAPACITY,
    "gauge",
    "{log_record}",
    "Capacity of the log record queue",
)
SDK_SPANS_EXPORTED: Final = _sdk(
    otel_metrics.OTEL_SDK_EXPORTER_SPAN_EXPORTED, "counter", "{span}", "Spans exported or failed", drops=True
)
SDK_LOGS_EXPORTED: Final = _sdk(
    otel_metrics.OTEL_SDK_EXPORTER_LOG_EXPORTED,
    "counter",
    "{log_record}",
    "Log records exported or failed",
    drops=True,
)
SDK_POINTS_EXPORTED: Final = _sdk(
    otel_metrics.OTEL_SDK_EXPORTER_METRIC_DATA_POINT_EXPORTED,
    "counter",
    "{data_point}",
    "Metric points exported or failed",
    drops=True,
)
SDK_EXPORT_DURATION: Final = Metric(
    otel_metrics.OTEL_SDK_EXPORTER_OPERATION_DURATION,
    "histogram",
    "s",
    "Duration of exports",
    {**_EXPORTER, ERROR_TYPE: _DROPPED},
)
SDK_COLLECTION_DURATION: Final = Metric(
    otel_metrics.OTEL_SDK_METRIC_READER_COLLECTION_DURATION,
    "histogram",
    "s",
    "Duration of the collection of metrics",
    {**_COMPONENT, ERROR_TYPE: _DROPPED},
)
SDK_SPANS_STARTED: Final = Metric(
    otel_metrics.OTEL_SDK_SPAN_STARTED,
    "counter",
    "{span}",
    "Spans started, by the sampler's decision",
    {
        "otel.span.parent.origin": ("none", "local", "remote"),
        "otel.span.sampling_result": ("DROP", "RECORD_ONLY", "RECORD_AND_SAMPLE"),
    },
)
SDK_SPANS_LEAVING: Final = _sdk(
    otel_metrics.OTEL_SDK_EXPORTER_SPAN_INFLIGHT, "gauge", "{span}", "Spans in an export that has not ended"
)
SDK_LOGS_LEAVING: Final = _sdk(
    otel_metrics.OTEL_SDK_EXPORTER_LOG_INFLIGHT,
    "gauge",
    "{log_record}",
    "Log records in an export that has not ended",
)
SDK_POINTS_LEAVING: Final = _sdk(
    otel_metrics.OTEL_SDK_EXPORTER_METRIC_DATA_POINT_INFLIGHT,
    "gauge",
    "{data_point}",
    "Metric points in an export that has not ended",
)

STANDARD: Final = (
    SERVER_DURATION,
    SERVER_ACTIVE,
    SERVER_BODY_SIZE,
    CLIENT_DURATION,
    GEN_AI_DURATION,
    GEN_AI_TOKENS,
    GEN_AI_FIRST_CHUNK,
    GEN_AI_NEXT_CHUNK,
    SDK_SPANS_STARTED,
    SDK_SPANS,
    SDK_LOGS,
    SDK_SPAN_QUEUE,
    SDK_LOG_QUEUE,
    SDK_SPAN_QUEUE_CAPACITY,
    SDK_LOG_QUEUE_CAPACITY,
    SDK_SPANS_EXPORTED,
    SDK_LOGS_EXPORTED,
    SDK_POINTS_EXPORTED,
    SDK_SPANS_LEAVING,
    SDK_LOGS_LEAVING,
    SDK_POINTS_LEAVING,
    SDK_EXPORT_DURATION,
    SDK_COLLECTION_DURATION,
)

_ITEMS: Final = ("spans", "log_records", "metric_points")
COLLECTOR: Final[dict[str, tuple[str, ...]]] = {
    **{
        f"otelcol_receiver_{what}_{item}_total": ("receiver", "transport")
        for what in ("accepted", "refused", "failed")
        for item in _ITEMS
    },
    **{
        f"otelcol_exporter_{what}_{item}_total": ("exporter",)
        for what in ("sent", "send_failed", "enqueue_failed")
        for item in _ITEMS
    },
    "otelcol_exporter_queue_size": ("exporter", "data_type"),
    "otelcol_exporter_queue_capacity": ("exporter", "data_type"),
    "otelcol_process_memory_rss_bytes": (),
    "otelcol_processor_tail_sampling_global_count_traces_sampled_total": ("sampled", "decision"),
    "otelcol_processor_tail_sampling_sampling_trace_dropped_too_early_total": (),
    "otelcol_processor_filter_logs_filtered_total": ("filter",),
    "up": ("job",),
}
"""The collector's own metrics with their labels; `up` tells whether it can be scraped."""
