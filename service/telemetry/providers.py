"""Builds the tracer, meter and logger providers of a process, and shuts them down within a deadline.

``build_telemetry`` is the entry point. It returns a ``Telemetry`` with the providers and the instruments.
"""

import logging
import secrets
import threading
import time
import uuid
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc._log_exporter import OTLPLogExporter as GrpcLogExporter
from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter as GrpcMetricExporter
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcSpanExporter
from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter as HttpLogExporter
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter as HttpMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpSpanExporter
from opentelemetry.metrics import (
    CallbackT,
    Counter,
    Meter,
    NoOpMeter,
    NoOpMeterProvider,
    ObservableUpDownCounter,
    UpDownCounter,
)
from opentelemetry.sdk._logs import LoggerProvider, ReadableLogRecord
from opentelemetry.sdk._logs.export import BatchLogRecordProcessor, LogRecordExporter, LogRecordExportResult
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricExporter, MetricReader, PeriodicExportingMetricReader
from opentelemetry.sdk.metrics.view import DropAggregation, ExplicitBucketHistogramAggregation, View
from opentelemetry.sdk.resources import OTELResourceDetector, ProcessResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanLimits, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import (
    ALWAYS_OFF,
    ALWAYS_ON,
    ParentBased,
    Sampler,
    SamplingResult,
)
from opentelemetry.semconv._incubating.attributes import (
    deployment_attributes,
    process_attributes,
    service_attributes,
)
from opentelemetry.semconv._incubating.metrics.http_metrics import HTTP_SERVER_RESPONSE_BODY_SIZE
from opentelemetry.semconv._incubating.metrics.otel_metrics import OTEL_SDK_PROCESSOR_LOG_QUEUE_SIZE
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
from service.telemetry.slices import Slices
from service.telemetry.tally import TallyCounter

SCOPE = "service"
ABORT_TIMEOUT_S = 0.5
"""Time for the exporters to give up after the deadline of the shutdown."""

MAX_ATTRIBUTE_CHARS = 2_048
"""Maximum length of a span's string attribute, unless ``OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT`` is set."""

RANDOM_BITS = 53
"""Random bits for one decision of the sampler."""

IDENTITY_PREFIXES = ("service.", "deployment.")

VOLATILE = frozenset(
    {
        process_attributes.PROCESS_COMMAND_ARGS,
        process_attributes.PROCESS_COMMAND_LINE,
        process_attributes.PROCESS_RUNTIME_DESCRIPTION,
    }
)
"""Attributes that a detector finds and that are left out of the resource."""

LOG_RECORDS = "{log_record}"

PROBES = frozenset({"/health", "/health/detailed"})
"""Paths of the health routes."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Exporters:
    """The exporters of the signals. A signal without an exporter is not exported."""

    spans: SpanExporter | None = None
    metrics: MetricReader | None = None
    logs: LogRecordExporter | None = None
    metric_exporter: MetricExporter | None = None

    def abort(self) -> Iterator[Callable[[], object]]:
        """Yield a function for each exporter that aborts an export in progress."""
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
        """The attributes of the resource that identify the service."""
        resource = self.tracer_provider.resource.attributes
        return {name: str(value) for name, value in resource.items() if name.startswith(IDENTITY_PREFIXES)}

    def shutdown(self, deadline_s: float) -> bool:
        """Flush and stop all signals in parallel; False where that was not done within the deadline.

        A provider's own ``shutdown`` waits up to 30 s for a collector that does not answer. Here each signal
        is flushed in a thread. At the deadline the exporters are stopped, which ends their retries; a thread
        that still runs after ``ABORT_TIMEOUT_S`` is abandoned.
        """
        threads = [threading.Thread(target=step, daemon=True) for step in self._shutdown_steps(deadline_s)]
        for thread in threads:
            thread.start()
        flushed = _join(threads, deadline_s)
        if not flushed:
            for abort in self.exporters.abort():
                threading.Thread(target=abort, daemon=True).start()
            _join(threads, ABORT_TIMEOUT_S)
        return flushed

    def _shutdown_steps(self, deadline_s: float) -> Iterator[Callable[[], None]]:
        millis = int(deadline_s * 1_000)
        if self.exporters.spans is not None:
            yield lambda: _flush_and_stop(self.tracer_provider, millis)
        if self.logger_provider is not None:
            logger_provider = self.logger_provider
            yield lambda: _flush_and_stop(logger_provider, millis)
        yield lambda: self.meter_provider.shutdown(timeout_millis=millis)


def build_telemetry(settings: Settings, exporters: Exporters | None = None) -> Telemetry:
    """Build the providers.

    Spans get ids even when nothing is recorded or exported, because the request id is the trace id.

    Args:
        settings: The service's settings.
        exporters: The exporters to use; by default those that the ``OTEL_*`` settings select.
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
        meter_provider=WrappedMeterProvider(meter_provider, _TracerMeter),
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


def exporters_from(settings: Settings) -> Exporters:
    """Create an OTLP exporter for each signal with an endpoint; the SDK reads headers and timeouts itself."""
    if settings.otel_sdk_disabled:
        return Exporters()
    general = settings.otel_exporter_otlp_protocol
    spans: SpanExporter | None = None
    metrics: MetricExporter | None = None
    logs: LogRecordExporter | None = None
    if _is_exported(settings.otel_traces_exporter, settings.otel_exporter_otlp_traces_endpoint, settings):
        grpc = (settings.otel_exporter_otlp_traces_protocol or general) == "grpc"
        spans = _GrpcSpans() if grpc else _HttpSpans()
    if _is_exported(settings.otel_metrics_exporter, settings.otel_exporter_otlp_metrics_endpoint, settings):
        grpc = (settings.otel_exporter_otlp_metrics_protocol or general) == "grpc"
        metrics = GrpcMetricExporter() if grpc else HttpMetricExporter()
    if _is_exported(settings.otel_logs_exporter, settings.otel_exporter_otlp_logs_endpoint, settings):
        grpc = (settings.otel_exporter_otlp_logs_protocol or general) == "grpc"
        logs = _GrpcLogs() if grpc else _HttpLogs()
    reader = PeriodicExportingMetricReader(metrics) if metrics else None
    return Exporters(spans, reader, logs, metrics)


class _GrpcSpans(GrpcSpanExporter):
    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        return super().export(Slices(spans))


class _HttpSpans(HttpSpanExporter):
    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        return super().export(Slices(spans))


class _GrpcLogs(GrpcLogExporter):
    def export(self, batch: Sequence[ReadableLogRecord]) -> LogRecordExportResult:
        return super().export(Slices(batch))


class _HttpLogs(HttpLogExporter):
    def export(self, batch: Sequence[ReadableLogRecord]) -> LogRecordExportResult:
        return super().export(Slices(batch))


def _is_exported(exporter: str, endpoint: str, settings: Settings) -> bool:
    return exporter == "otlp" and bool(endpoint or settings.otel_exporter_otlp_endpoint)


def sampler_from(settings: Settings) -> Sampler:
    """Create the sampler that the standard settings name.

    What a remote parent says is ignored: its decision, its trace id and its ``tracestate``. Callers could
    otherwise choose which of their requests are recorded. The decision of a local parent is followed.
    """
    if settings.otel_sdk_disabled:
        return ALWAYS_OFF
    chosen = settings.otel_traces_sampler.removeprefix("parentbased_")
    root: Sampler = {
        "always_on": ALWAYS_ON,
        "always_off": ALWAYS_OFF,
        "traceidratio": RandomRatio(settings.otel_traces_sampler_arg),
    }[chosen]
    return ExceptProbes(ParentBased(root, remote_parent_sampled=root, remote_parent_not_sampled=root))


class _ChoosingSampler(Sampler):
    """Delegates each decision to a sampler that it chooses."""

    @abstractmethod
    def _choose(self, kind: SpanKind | None, attributes: Attributes) -> Sampler:
        """The sampler that decides on a span of this kind with these attributes."""

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
        """Decide on a span that is about to start."""
        return self._choose(kind, attributes).should_sample(
            parent_context, trace_id, name, kind, attributes, links, trace_state
        )


class RandomRatio(_ChoosingSampler):
    """Records a share of the traces, each by a random number of this process.

    The SDK's sampler for the same setting decides by the trace id, which a caller may choose.

    Args:
        ratio: The share, from 0 to 1.
        random_bits: Returns a number of so many random bits, which a caller cannot predict.
    """

    def __init__(self, ratio: float, random_bits: Callable[[int], int] = secrets.randbits) -> None:
        self._ratio = ratio
        self._bound = round(ratio * 2**RANDOM_BITS)
        self._random_bits = random_bits

    def _choose(self, kind: SpanKind | None, attributes: Attributes) -> Sampler:
        del kind, attributes
        return ALWAYS_ON if self._random_bits(RANDOM_BITS) < self._bound else ALWAYS_OFF

    def get_description(self) -> str:
        """Return the sampler's name and its share."""
        return f"RandomRatio{{{self._ratio}}}"


class ExceptProbes(_ChoosingSampler):
    """Drops the server spans of the health routes, and delegates the decision on all other spans.

    Probes are frequent and their traces are not useful. A dropped span costs little, and its id still becomes
    the ``X-Request-ID`` of the answer.
    """

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler

    def _choose(self, kind: SpanKind | None, attributes: Attributes) -> Sampler:
        is_probe = kind is SpanKind.SERVER and attributes and attributes.get(URL_PATH) in PROBES
        return ALWAYS_OFF if is_probe else self._sampler

    def get_description(self) -> str:
        """Return the sampler's name."""
        return f"ExceptProbes({self._sampler.get_description()})"


class WrappedMeter(NoOpMeter):
    """Passes on to another meter what a subclass implements; other instruments record nothing."""

    def __init__(self, inner: Meter) -> None:
        super().__init__(inner.name, inner.version, inner.schema_url)
        self._inner = inner


class WrappedMeterProvider(NoOpMeterProvider):
    """Wraps each meter of another provider.

    Args:
        inner: Creates the meters.
        wrapper: The class that wraps them.
    """

    def __init__(self, inner: MeterProvider, wrapper: type[WrappedMeter]) -> None:
        self._inner = inner
        self._wrapper = wrapper

    def get_meter(
        self,
        name: str,
        version: str | None = None,
        schema_url: str | None = None,
        attributes: Attributes = None,
    ) -> Meter:
        """Create a meter and wrap it."""
        return self._wrapper(self._inner.get_meter(name, version, schema_url, attributes))


class _TracerMeter(WrappedMeter):
    """The tracer provider's meter, with the SDK's count of started spans, and without that of live spans.

    Requests and calls in flight have metrics of their own. The SDK counts started spans with a counter, and
    live spans with an up-down counter.
    """

    def create_counter(self, name: str, unit: str = "", description: str = "") -> Counter:
        return TallyCounter(self._inner, name, unit, description)


class _LogQueueMeter(_TracerMeter):
    """The log processor's meter: the conventions' unit for the queue's size, where the SDK has another."""

    def create_up_down_counter(self, name: str, unit: str = "", description: str = "") -> UpDownCounter:
        return self._inner.create_up_down_counter(name, unit, description)

    def create_observable_up_down_counter(
        self,
        name: str,
        callbacks: Sequence[CallbackT] | None = None,
        unit: str = "",
        description: str = "",
    ) -> ObservableUpDownCounter:
        unit = LOG_RECORDS if name == OTEL_SDK_PROCESSOR_LOG_QUEUE_SIZE else unit
        return self._inner.create_observable_up_down_counter(name, callbacks, unit, description)


def _span_limits() -> SpanLimits:
    from_environment = SpanLimits()
    if from_environment.max_span_attribute_length is not None:
        return from_environment
    return SpanLimits(max_span_attribute_length=MAX_ATTRIBUTE_CHARS)


def _logger_provider(
    exporters: Exporters, resource: Resource, meter_provider: MeterProvider
) -> LoggerProvider | None:
    """Create the logger provider, which also adds span events, when spans or logs are exported."""
    if exporters.spans is None and exporters.logs is None:
        return None
    # Without the SDK's count of created log records, to save its calls; the queue's metrics are kept.
    provider = LoggerProvider(resource, shutdown_on_exit=False, meter_provider=NoOpMeterProvider())
    provider.add_log_record_processor(SpanEventProcessor())
    if exporters.logs is not None:
        provider.add_log_record_processor(
            BatchLogRecordProcessor(
                exporters.logs, meter_provider=WrappedMeterProvider(meter_provider, _LogQueueMeter)
            )
        )
    return provider


def _resource(settings: Settings) -> Resource:
    """Create the resource; ``OTEL_RESOURCE_ATTRIBUTES`` and ``OTEL_SERVICE_NAME`` take precedence.

    It is without what would make a new series of each metric at a restart, or may hold a secret.
    """
    own = Resource(
        {
            service_attributes.SERVICE_NAME: settings.otel_service_name,
            service_attributes.SERVICE_NAMESPACE: "llmops",
            service_attributes.SERVICE_VERSION: version("llmops-api"),
            service_attributes.SERVICE_INSTANCE_ID: str(uuid.uuid4()),
            deployment_attributes.DEPLOYMENT_ENVIRONMENT_NAME: settings.environment,
        }
    )
    process = ProcessResourceDetector().detect().attributes
    detected = Resource({key: value for key, value in process.items() if key not in VOLATILE}).merge(own)
    sdk = Resource(
        {
            "telemetry.sdk.language": "python",
            "telemetry.sdk.name": "opentelemetry",
            "telemetry.sdk.version": version("opentelemetry-sdk"),
        }
    )
    merged = Resource.get_empty().merge(sdk).merge(detected).merge(OTELResourceDetector().detect())
    return _HashedResource(dict(merged.attributes), merged.schema_url)


class _HashedResource(Resource):
    """A resource that is hashed once; the exporters look it up for each span and log record.

    The SDK's own hash is that of a JSON text, made anew each time: a seventh of the time to encode a span.
    """

    def __init__(self, attributes: Attributes, schema_url: str) -> None:
        super().__init__(attributes or {}, schema_url)
        self._hash = super().__hash__()

    def __eq__(self, other: object) -> bool:
        return self is other or super().__eq__(other)

    def __hash__(self) -> int:
        return self._hash


def _views() -> list[View]:
    to_two_minutes = ExplicitBucketHistogramAggregation(HTTP_DURATION_BUCKETS)
    return [
        View(instrument_name=HTTP_SERVER_REQUEST_DURATION, aggregation=to_two_minutes),
        View(instrument_name=HTTP_CLIENT_REQUEST_DURATION, aggregation=to_two_minutes),
        # The instrumentation stores the size on an object that all requests share, so it is wrong for
        # streams.
        View(instrument_name=HTTP_SERVER_RESPONSE_BODY_SIZE, aggregation=DropAggregation()),
    ]


def _flush_and_stop(provider: TracerProvider | LoggerProvider, millis: int) -> None:
    provider.force_flush(millis)
    provider.shutdown()


def _join(threads: list[threading.Thread], deadline_s: float) -> bool:
    end = time.monotonic() + deadline_s
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    return not any(thread.is_alive() for thread in threads)
