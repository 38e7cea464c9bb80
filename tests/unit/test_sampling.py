"""Which spans are recorded: the setting decides, whatever a remote caller sends."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import Decision
from opentelemetry.trace import (
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    TraceFlags,
    Tracer,
    TraceState,
)

from service.telemetry.providers import PROBES, RandomRatio, sampler_from
from tests.harness import make_settings
from tests.unit.conftest import Read

ALWAYS = ["always_on", "parentbased_always_on"]
NEVER = ["always_off", "parentbased_always_off"]
RATIO = ["traceidratio", "parentbased_traceidratio"]

# A sampler that goes by the trace id records all of its ids and none of the other.
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


STATES = ["", "ot=th:0", "ot=th:ffffffffffffff", "ot=rv:00000000000000", "ot=rv:ffffffffffffff;th:0"]


@pytest.mark.parametrize("sampler", RATIO)
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("flags", [0x00, 0x01, 0x02, 0x03])
@pytest.mark.parametrize("trace_id", [SAMPLED_BY_HALF, DROPPED_BY_HALF])
def test_a_ratio_is_the_same_for_whatever_a_caller_sends(
    sampler: str, state: str, flags: int, trace_id: int
) -> None:
    tracer = _tracer(sampler, 0.5)
    given = SpanContext(
        trace_id,
        0x2,
        is_remote=True,
        trace_flags=TraceFlags(flags),
        trace_state=TraceState.from_header([state]),
    )
    context = trace.set_span_in_context(NonRecordingSpan(given))
    recorded = 0
    for _request in range(200):
        with _span(tracer, context) as span:
            recorded += span.is_recording()
            assert span.get_span_context().trace_id == trace_id
    # With half of the traces, fewer than 40 or more than 160 of 200 come once in 10^18 runs.
    assert 40 <= recorded <= 160


@pytest.mark.parametrize(
    ("ratio", "number", "recorded"),
    [
        (0.25, 0, True),
        (0.25, 2**51 - 1, True),
        (0.25, 2**51, False),
        (0.0, 0, False),
        (1.0, 2**53 - 1, True),
    ],
)
def test_a_ratio_is_the_share_of_the_random_numbers(
    ratio: float,
    number: int,
    recorded: bool,  # noqa: FBT001 - pytest passes it by name
) -> None:
    sampler = RandomRatio(ratio, lambda _bits: number)
    decision = sampler.should_sample(None, SAMPLED_BY_HALF, "POST").decision
    assert (decision is Decision.RECORD_AND_SAMPLE) is recorded


def test_the_spans_of_one_request_are_recorded_all_or_none() -> None:
    tracer = _tracer("traceidratio", 0.5)
    for _request in range(50):
        with (
            _span(tracer, _parent(sampled=True, remote=True)) as span,
            tracer.start_as_current_span("inner") as inner,
        ):
            assert inner.is_recording() is span.is_recording()


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
