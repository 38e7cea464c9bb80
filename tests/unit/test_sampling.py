"""Which spans are recorded: the setting decides, a remote caller's flag and a probe's path do not."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import NonRecordingSpan, Span, SpanContext, SpanKind, TraceFlags, Tracer

from service.telemetry.providers import PROBES, sampler_from
from tests.harness import make_settings
from tests.unit.conftest import Read

ALWAYS = ["always_on", "parentbased_always_on"]
NEVER = ["always_off", "parentbased_always_off"]
RATIO = ["traceidratio", "parentbased_traceidratio"]

# The ratio samplers look at the low 64 bits of the id.
SAMPLED_BY_HALF = 0x1111_1111_1111_1111_1111_1111_1111_1111
DROPPED_BY_HALF = 0x1111_1111_1111_1111_F111_1111_1111_1111


def _tracer(sampler: str, ratio: float = 1.0, *, disabled: bool = False) -> Tracer:
    settings = make_settings(
        otel_traces_sampler=sampler, otel_traces_sampler_arg=ratio, otel_sdk_disabled=disabled
    )
    return TracerProvider(sampler=sampler_from(settings), shutdown_on_exit=False).get_tracer("test")


def _parent(*, sampled: bool, remote: bool, trace_id: int = SAMPLED_BY_HALF) -> Context:
    flags = TraceFlags(TraceFlags.SAMPLED if sampled else TraceFlags.DEFAULT)
    return trace.set_span_in_context(NonRecordingSpan(SpanContext(trace_id, 0x2, remote, flags)))


@contextmanager
def _span(tracer: Tracer, context: Context | None = None, path: str = "/llm/generate") -> Iterator[Span]:
    with tracer.start_as_current_span(
        "POST", context, kind=SpanKind.SERVER, attributes={"url.path": path}
    ) as span:
        yield span


@pytest.mark.parametrize("sampler", ALWAYS + NEVER + RATIO)
def test_each_sampler_has_a_description(sampler: str) -> None:
    assert "ExceptProbes(" in sampler_from(make_settings(otel_traces_sampler=sampler)).get_description()


def test_without_a_wish_everything_is_recorded(read: Read) -> None:
    settings = read().settings
    assert settings is not None
    tracer = TracerProvider(sampler=sampler_from(settings), shutdown_on_exit=False).get_tracer("test")
    with _span(tracer) as span:
        assert span.is_recording()


@pytest.mark.parametrize("sampled", [True, False])
@pytest.mark.parametrize(
    ("sampler", "ratio", "recorded"),
    [
        *((name, 0.0, True) for name in ALWAYS),
        *((name, 1.0, False) for name in NEVER),
        *((name, 1.0, True) for name in RATIO),
        *((name, 0.0, False) for name in RATIO),
    ],
)
def test_a_remote_parents_flag_is_not_obeyed(
    sampler: str,
    ratio: float,
    recorded: bool,  # noqa: FBT001 - pytest passes it by name
    sampled: bool,  # noqa: FBT001 - pytest passes it by name
) -> None:
    tracer = _tracer(sampler, ratio)
    with _span(tracer, _parent(sampled=sampled, remote=True)) as span:
        assert span.is_recording() is recorded
        context = span.get_span_context()
        assert context.trace_id == SAMPLED_BY_HALF
        assert context.trace_flags.sampled is recorded
    with _span(tracer) as root:
        assert root.is_recording() is recorded


@pytest.mark.parametrize("sampler", RATIO)
@pytest.mark.parametrize("sampled", [True, False])
def test_a_ratio_goes_by_the_trace_id_alone(sampler: str, sampled: bool) -> None:  # noqa: FBT001 - pytest passes it by name
    tracer = _tracer(sampler, 0.5)
    for trace_id, recorded in ((SAMPLED_BY_HALF, True), (DROPPED_BY_HALF, False)):
        with _span(tracer, _parent(sampled=sampled, remote=True, trace_id=trace_id)) as span:
            assert span.is_recording() is recorded


@pytest.mark.parametrize("sampler", ALWAYS + NEVER + RATIO)
@pytest.mark.parametrize("sampled", [True, False])
def test_a_local_parents_decision_is_followed(sampler: str, sampled: bool) -> None:  # noqa: FBT001 - pytest passes it by name
    context = _parent(sampled=sampled, remote=False)
    with _tracer(sampler, 0.0).start_as_current_span("inner", context) as span:
        assert span.is_recording() is sampled


@pytest.mark.parametrize("path", sorted(PROBES))
@pytest.mark.parametrize("context", [None, _parent(sampled=True, remote=True)])
def test_a_probe_is_not_recorded_and_has_an_id(path: str, context: Context | None) -> None:
    tracer = _tracer("always_on")
    with _span(tracer, context, path) as span:
        assert span.get_span_context().is_valid
        assert not span.is_recording()
        with tracer.start_as_current_span("inner") as inner:
            assert not inner.is_recording()
            assert inner.get_span_context().trace_id == span.get_span_context().trace_id


@pytest.mark.parametrize("path", ["/health/other", "/healthy", "/", "/v1/health", "/health/"])
def test_a_path_like_a_probes_is_recorded(path: str) -> None:
    with _span(_tracer("always_on"), path=path) as span:
        assert span.is_recording()


def test_another_kind_of_span_for_a_probes_path_is_recorded() -> None:
    tracer = _tracer("always_on")
    for kind in (SpanKind.CLIENT, SpanKind.INTERNAL):
        span = tracer.start_span("GET", kind=kind, attributes={"url.path": "/health"})
        assert span.is_recording()
    assert tracer.start_span("GET", kind=SpanKind.SERVER).is_recording()


@pytest.mark.parametrize("sampler", ALWAYS + RATIO)
def test_disabled_records_nothing_and_ids_stay(sampler: str) -> None:
    with _span(_tracer(sampler, disabled=True), _parent(sampled=True, remote=True)) as span:
        assert not span.is_recording()
        assert span.get_span_context().trace_id == SAMPLED_BY_HALF
        assert span.get_span_context().span_id != 0x2
