"""Builds the tracer, meter and logger providers of a process, and shuts them down under a deadline."""

import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, cast

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc._log_exporter import OTLPLogExporter as GrpcLogExporter
from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter as GrpcMetricExporter
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcSpanExporter
from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter as HttpLogExporter
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter as HttpMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpSpanExporter
from opentelemetry.metrics import Meter, NoOpMeterProvider, NoOpUpDownCounter, UpDownCounter
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk._logs.export import BatchLogRecordProcessor, LogRecordExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricExporter, MetricReader, PeriodicExportingMetricReader
from opentelemetry.sdk.metrics.view import DropAggregation, ExplicitBucketHistogramAggregation, View
from opentelemetry.sdk.resources import OTELResourceDetector, ProcessResourceDetector, Resource
from opentelemetry.sdk.trace import SpanLimits, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.sampling import (
    ALWAYS_OFF,
    ALWAYS_ON,
    Decision,
    ParentBased,
    Sampler,
    SamplingResult,
    TraceIdRatioBased,
)
from opentelemetry.semconv._incubating.attributes import deployment_attributes, service_attributes
from opentelemetry.semconv._incubating.metrics.http_metrics import HTTP_SERVER_RESPONSE_BODY_SIZE
from opentelemetry.semconv._incubating.metrics.otel_metrics import OTEL_SDK_SPAN_LIVE
from opentelemetry.semconv.attributes.url_attributes import URL_PATH
from opentelemetry.semconv.metrics.http_metrics import (
    HTTP_CLIENT_REQUEST_DURATION,
    HTTP_SERVER_REQUEST_DURATION,
)
from opentelemetry.trace import Link, SpanKind, TraceState
from opentelemetry.util.types import Attributes

from service.config.settings import Settings
from service.telemetry.events import SpanEventProcessor
from service.telemetry.instruments import Instruments
from service.telemetry.names import HTTP_DURATION_BUCKETS

PROBES = frozenset({"/health", "/health/detailed"})


class ExceptProbes(Sampler):
    """Leaves out the server spans of the health routes, and decides like another sampler on the rest.

    Probes come every few seconds and say nothing; unrecorded they cost little and keep their header.
    """

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler

    def should_sample(  # noqa: PLR0913, PLR0917 - the SDK's interface
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,
        kind: SpanKind | None = None,
        attributes: Attributes = None,
        links: Sequence[Link] | None = None,
        trace_state: TraceState | None = None,
    ) -> SamplingResult:
        """The decision for one span that is about to start."""
        if kind is SpanKind.SERVER and attributes and attributes.get(URL_PATH) in PROBES:
            return SamplingResult(Decision.DROP, None, trace_state)
        return self._sampler.should_sample(
            parent_context, trace_id, name, kind, attributes, links, trace_state
        )

    def get_description(self) -> str:
        """What the sampler calls itself."""
        return f"ExceptProbes({self._sampler.get_description()})"


def sampler_from(settings: Settings) -> Sampler:
    """The sampler that the standard settings name.

    A remote parent's flag is not obeyed: both branches sample as a root would, or a caller could switch the
    recording of their own requests off. A local parent's decision is followed.
    """
    if settings.otel_sdk_disabled:
        return ALWAYS_OFF
    chosen = settings.otel_traces_sampler.removeprefix("parentbased_")
    root: Sampler = {
        "always_on": ALWAYS_ON,
        "always_off": ALWAYS_OFF,
        "traceidratio": TraceIdRatioBased(settings.otel_traces_sampler_arg),
    }[chosen]
    return ExceptProbes(ParentBased(root, remote_parent_sampled=root, remote_parent_not_sampled=root))


SCOPE = "service"
ABORT_S = 0.5
MAX_ATTRIBUTE_CHARS = 2_048
"""Longest string attribute of a span, where ``OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT`` does not say otherwise."""

IDENTITY = ("service.", "deployment.")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Exporters:
    """Where the signals go; none of a kind, and nothing of it is exported."""

    spans: SpanExporter | None = None
    metrics: MetricReader | None = None
    logs: LogRecordExporter | None = None
    metric_exporter: MetricExporter | None = None

    def abort(self) -> Iterator[Callable[[], object]]:
        """For each exporter, what makes an export under way give up."""
        for exporter in (self.spans, self.logs, self.metric_exporter):
            if exporter is not None:
                yield exporter.shutdown


@dataclass(frozen=True)
class Telemetry:
    """The providers of one process, and the instruments made from them."""

    tracer_provider: TracerProvider
    meter_provider: MeterProvider
    logger_provider: LoggerProvider | None
    instruments: Instruments
    exporters: Exporters

    @property
    def identity(self) -> dict[str, str]:
        """Who this process is: the attributes of its resource that name the service."""
        resource = self.tracer_provider.resource.attributes
        return {name: str(value) for name, value in resource.items() if name.startswith(IDENTITY)}

    def shutdown(self, deadline_s: float) -> bool:
        """Flush and stop all signals at the same time; whether all of it was done within the deadline.

        A provider's own ``shutdown`` waits up to 30 s for a collector that does not answer. Here each signal
        is flushed in a thread of its own; at the deadline the exporters are stopped, which ends their
        retries; whatever still hangs half a second later is left to a daemon thread.
        """
        finishers = [threading.Thread(target=step, daemon=True) for step in self._finishers(deadline_s)]
        for thread in finishers:
            thread.start()
        flushed = _join(finishers, deadline_s)
        if not flushed:
            for give_up in self.exporters.abort():
                threading.Thread(target=give_up, daemon=True).start()
            _join(finishers, ABORT_S)
        return flushed

    def _finishers(self, deadline_s: float) -> Iterator[Callable[[], None]]:
        millis = int(deadline_s * 1_000)
        if self.exporters.spans is not None:
            yield lambda: _finish(self.tracer_provider, millis)
        if self.logger_provider is not None:
            yield lambda: _finish(self.logger_provider, millis)
        yield lambda: self.meter_provider.shutdown(timeout_millis=millis)


def _finish(provider: TracerProvider | LoggerProvider | None, millis: int) -> None:
    if provider is not None:
        provider.force_flush(millis)
        provider.shutdown()


def _join(threads: list[threading.Thread], deadline_s: float) -> bool:
    end = time.monotonic() + deadline_s
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    return not any(thread.is_alive() for thread in threads)


def build_telemetry(settings: Settings, exporters: Exporters | None = None) -> Telemetry:
    """Build the providers; without exporters given, those that the standard ``OTEL_*`` settings ask for.

    Ids exist in every case, also when nothing is recorded or exported: the request id is the trace id.
    """
    if exporters is None:
        exporters = exporters_from(settings)
    resource = _resource(settings)
    meter_provider = MeterProvider(
        metric_readers=[exporters.metrics] if exporters.metrics else [],
        resource=resource,
        views=_views(),
        shutdown_on_exit=False,
    )
    tracer_provider = TracerProvider(
        sampler=sampler_from(settings),
        resource=resource,
        span_limits=_span_limits(),
        shutdown_on_exit=False,
        meter_provider=cast("MeterProvider", _WithoutLiveSpans(meter_provider)),
    )
    if exporters.spans is not None:
        tracer_provider.add_span_processor(BatchSpanProcessor(exporters.spans, meter_provider=meter_provider))
    return Telemetry(
        tracer_provider=tracer_provider,
        meter_provider=meter_provider,
        logger_provider=_logger_provider(exporters, resource, meter_provider),
        instruments=Instruments(meter_provider.get_meter(SCOPE, version("llmops-api"))),
        exporters=exporters,
    )


class _WithoutLiveSpans:
    """A meter provider that counts no spans that are under way.

    The SDK would count each span twice more, up and down: one fifteenth of a request's function calls, for a
    number that nobody reads; requests and calls in flight have metrics of their own.
    """

    def __init__(self, inner: MeterProvider | Meter) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    def get_meter(self, *args: Any, **kwargs: Any) -> "_WithoutLiveSpans":  # noqa: ANN401 - passed on unread
        return _WithoutLiveSpans(cast("MeterProvider", self._inner).get_meter(*args, **kwargs))

    def create_up_down_counter(self, name: str, **kwargs: Any) -> UpDownCounter:  # noqa: ANN401 - passed on unread
        if name == OTEL_SDK_SPAN_LIVE:
            return NoOpUpDownCounter(name, **kwargs)
        return cast("Meter", self._inner).create_up_down_counter(name, **kwargs)


def _span_limits() -> SpanLimits:
    asked = SpanLimits()
    if asked.max_span_attribute_length is not None:
        return asked
    return SpanLimits(max_span_attribute_length=MAX_ATTRIBUTE_CHARS)


def _logger_provider(
    exporters: Exporters, resource: Resource, meter_provider: MeterProvider
) -> LoggerProvider | None:
    """The bridge's provider; it serves span events too, so it exists when either signal is exported."""
    if exporters.spans is None and exporters.logs is None:
        return None
    # The SDK's count of log records made is left out, as that of spans under way; its queue's counts are not.
    provider = LoggerProvider(resource, shutdown_on_exit=False, meter_provider=NoOpMeterProvider())
    provider.add_log_record_processor(SpanEventProcessor())
    if exporters.logs is not None:
        provider.add_log_record_processor(
            BatchLogRecordProcessor(exporters.logs, meter_provider=meter_provider)
        )
    return provider


def _resource(settings: Settings) -> Resource:
    """Who this process is; ``OTEL_RESOURCE_ATTRIBUTES`` and ``OTEL_SERVICE_NAME`` have the last word."""
    own = Resource(
        {
            service_attributes.SERVICE_NAME: settings.otel_service_name,
            service_attributes.SERVICE_NAMESPACE: "llmops",
            service_attributes.SERVICE_VERSION: version("llmops-api"),
            service_attributes.SERVICE_INSTANCE_ID: str(uuid.uuid4()),
            deployment_attributes.DEPLOYMENT_ENVIRONMENT_NAME: settings.environment,
        }
    )
    detected = ProcessResourceDetector().detect().merge(own)
    return Resource.get_empty().merge(_sdk()).merge(detected).merge(OTELResourceDetector().detect())


def _sdk() -> Resource:
    return Resource(
        {
            "telemetry.sdk.language": "python",
            "telemetry.sdk.name": "opentelemetry",
            "telemetry.sdk.version": version("opentelemetry-sdk"),
        }
    )


def _views() -> list[View]:
    to_two_minutes = ExplicitBucketHistogramAggregation(HTTP_DURATION_BUCKETS)
    return [
        View(instrument_name=HTTP_SERVER_REQUEST_DURATION, aggregation=to_two_minutes),
        View(instrument_name=HTTP_CLIENT_REQUEST_DURATION, aggregation=to_two_minutes),
        # The contrib middleware keeps this size on itself, shared by all requests, so streams get another's.
        View(instrument_name=HTTP_SERVER_RESPONSE_BODY_SIZE, aggregation=DropAggregation()),
    ]


def exporters_from(settings: Settings) -> Exporters:
    """The OTLP exporters of each signal that has an endpoint; the SDK reads headers and time-outs itself."""
    if settings.otel_sdk_disabled:
        return Exporters()
    general = settings.otel_exporter_otlp_protocol
    spans: SpanExporter | None = None
    metrics: MetricExporter | None = None
    logs: LogRecordExporter | None = None
    if _wanted(settings.otel_traces_exporter, settings.otel_exporter_otlp_traces_endpoint, settings):
        grpc = (settings.otel_exporter_otlp_traces_protocol or general) == "grpc"
        spans = GrpcSpanExporter() if grpc else HttpSpanExporter()
    if _wanted(settings.otel_metrics_exporter, settings.otel_exporter_otlp_metrics_endpoint, settings):
        grpc = (settings.otel_exporter_otlp_metrics_protocol or general) == "grpc"
        metrics = GrpcMetricExporter() if grpc else HttpMetricExporter()
    if _wanted(settings.otel_logs_exporter, settings.otel_exporter_otlp_logs_endpoint, settings):
        grpc = (settings.otel_exporter_otlp_logs_protocol or general) == "grpc"
        logs = GrpcLogExporter() if grpc else HttpLogExporter()
    reader = PeriodicExportingMetricReader(metrics) if metrics else None
    return Exporters(spans, reader, logs, metrics)


def _wanted(exporter: str, endpoint: str, settings: Settings) -> bool:
    return exporter == "otlp" and bool(endpoint or settings.otel_exporter_otlp_endpoint)
