"""Where each signal goes by the standard variables, and that stopping keeps its word."""

import logging
import threading
import time
from collections.abc import Callable, Sequence

import pytest

from service.config.settings import Settings
from service.telemetry import providers
from service.telemetry.events import emit
from service.telemetry.providers import Telemetry, build_telemetry, exporters_from
from service.telemetry.slices import FEWEST, Slices
from tests.fakes.otlp import OtlpReceiver
from tests.fakes.upstream import refusing_port
from tests.unit.conftest import Lines, Read

logger = logging.getLogger("service.test")

EXPORT_TIMEOUT_S = 10
"""The exporters' own time limit by default, which a stop must not wait for."""


def _settings(read: Read, **variables: str) -> Settings:
    report = read(**variables)
    assert report.settings is not None, report.errors
    return report.settings


def _say_something(telemetry: Telemetry, lines: Lines) -> str:
    """One span with an event, one count and one record; the trace id."""
    lines.configure("INFO", telemetry.logger_provider)
    with telemetry.tracer_provider.get_tracer("test").start_as_current_span("work") as span:
        emit(logger, "llmops.something", "said", {"n": 1})
    telemetry.instruments.requests_rejected.add(3, {"reason": "too_large"})
    return f"{span.get_span_context().trace_id:032x}"


def _arrived(receiver: OtlpReceiver, trace_id: str) -> set[str]:
    signals = {
        "traces": bool(receiver.spans(trace_id, "work")),
        "logs": bool(receiver.logs(trace_id)),
        "metrics": receiver.value("llmops.requests.rejected", {"reason": "too_large"}) == 3,
    }
    return {signal for signal, there in signals.items() if there}


def _sent(read: Read, lines: Lines, receiver: OtlpReceiver, **variables: str) -> set[str]:
    telemetry = build_telemetry(_settings(read, **variables))
    trace_id = _say_something(telemetry, lines)
    assert telemetry.shutdown(10) is True
    return _arrived(receiver, trace_id)


def _sdk_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("Otel")}


ALL = {"traces", "logs", "metrics"}


@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
def test_after_a_healthy_stop_everything_has_arrived(
    read: Read, lines: Lines, receiver: OtlpReceiver, protocol: str
) -> None:
    url = receiver.grpc_url if protocol == "grpc" else receiver.http_url
    before = _sdk_threads()
    telemetry = build_telemetry(
        _settings(read, OTEL_EXPORTER_OTLP_ENDPOINT=url, OTEL_EXPORTER_OTLP_PROTOCOL=protocol)
    )
    trace_id = _say_something(telemetry, lines)
    assert telemetry.shutdown(10) is True

    assert _arrived(receiver, trace_id) == ALL
    (span,) = receiver.spans(trace_id)
    (log,) = receiver.logs(trace_id)
    assert [event.name for event in span.events] == ["llmops.something"]
    assert (log.body, log.severity, log.event_name, log.span_id) == (
        "said",
        "INFO",
        "llmops.something",
        span.span_id,
    )
    assert span.resource == log.resource == receiver.latest("llmops.requests.rejected")[0].resource
    assert receiver.latest("llmops.auth.attempts")[0].temporality == "CUMULATIVE"
    assert _sdk_threads() <= before


def test_http_is_the_protocol_without_a_wish(read: Read, lines: Lines, receiver: OtlpReceiver) -> None:
    assert _sent(read, lines, receiver, OTEL_EXPORTER_OTLP_ENDPOINT=receiver.http_url) == ALL


@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
def test_encoding_many_spans_and_log_records_lets_the_event_loop_run(
    read: Read, lines: Lines, receiver: OtlpReceiver, monkeypatch: pytest.MonkeyPatch, protocol: str
) -> None:
    paused: set[str] = set()

    class Noted(Slices[object]):
        def __init__(self, items: Sequence[object]) -> None:
            super().__init__(items, lambda _seconds: paused.add(type(items[0]).__name__))

    monkeypatch.setattr(providers, "Slices", Noted)
    url = receiver.grpc_url if protocol == "grpc" else receiver.http_url
    telemetry = build_telemetry(
        _settings(read, OTEL_EXPORTER_OTLP_ENDPOINT=url, OTEL_EXPORTER_OTLP_PROTOCOL=protocol)
    )
    trace_id = _say_something(telemetry, lines)
    tracer = telemetry.tracer_provider.get_tracer("test")
    for number in range(FEWEST):
        tracer.start_span(f"work {number}").end()
        emit(logger, "llmops.something", "said", {"n": number})
    assert telemetry.shutdown(10) is True
    assert paused == {"ReadableSpan", "ReadableLogRecord"}
    assert _arrived(receiver, trace_id) == ALL
    assert (len(receiver.spans()), len(receiver.logs())) == (FEWEST + 1, FEWEST + 1)


@pytest.mark.parametrize("signal", sorted(ALL))
@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
def test_one_signal_alone_can_have_an_endpoint(
    read: Read, lines: Lines, receiver: OtlpReceiver, signal: str, protocol: str
) -> None:
    name = f"OTEL_EXPORTER_OTLP_{signal.upper()}"
    url = receiver.grpc_url if protocol == "grpc" else f"{receiver.http_url}/v1/{signal}"
    sent = _sent(read, lines, receiver, **{f"{name}_ENDPOINT": url, f"{name}_PROTOCOL": protocol})
    assert sent == {signal}
    assert len(receiver.raw) >= 1


def test_a_signals_own_endpoint_and_protocol_go_before_the_general_ones(
    read: Read, lines: Lines, receiver: OtlpReceiver
) -> None:
    with OtlpReceiver() as general:
        telemetry = build_telemetry(
            _settings(
                read,
                OTEL_EXPORTER_OTLP_ENDPOINT=general.http_url,
                OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=receiver.grpc_url,
                OTEL_EXPORTER_OTLP_TRACES_PROTOCOL="grpc",
            )
        )
        trace_id = _say_something(telemetry, lines)
        assert telemetry.shutdown(10) is True
        assert _arrived(general, trace_id) == {"logs", "metrics"}
    assert _arrived(receiver, trace_id) == {"traces"}


@pytest.mark.parametrize("signal", sorted(ALL))
def test_a_signal_can_be_left_out(read: Read, lines: Lines, receiver: OtlpReceiver, signal: str) -> None:
    variables = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.http_url,
        f"OTEL_{signal.upper()}_EXPORTER": "none",
    }
    assert _sent(read, lines, receiver, **variables) == ALL - {signal}


def test_without_spans_or_logs_there_is_no_bridge(read: Read) -> None:
    settings = _settings(
        read,
        OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9",
        OTEL_TRACES_EXPORTER="none",
        OTEL_LOGS_EXPORTER="none",
        OTEL_METRICS_EXPORTER="none",
    )
    assert build_telemetry(settings).logger_provider is None
    assert exporters_from(settings).metrics is None


def _timed(stop: Callable[[float], bool], deadline_s: float) -> tuple[bool, float]:
    started = time.monotonic()
    done = stop(deadline_s)
    return done, time.monotonic() - started


PROTOCOLS = pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])


@PROTOCOLS
def test_a_collector_that_hangs_does_not_hold_up_the_stop(
    read: Read, lines: Lines, receiver: OtlpReceiver, protocol: str
) -> None:
    receiver.hang = True
    url = receiver.grpc_url if protocol == "grpc" else receiver.http_url
    telemetry = build_telemetry(
        _settings(read, OTEL_EXPORTER_OTLP_ENDPOINT=url, OTEL_EXPORTER_OTLP_PROTOCOL=protocol)
    )
    _say_something(telemetry, lines)
    done, took_s = _timed(telemetry.shutdown, 0.5)
    assert done is False
    assert took_s < EXPORT_TIMEOUT_S
    assert receiver.exports > 0
    assert receiver.raw == []


@PROTOCOLS
def test_a_collector_that_is_not_there_does_not_hold_up_the_stop(
    read: Read, lines: Lines, protocol: str
) -> None:
    with refusing_port() as port:
        telemetry = build_telemetry(
            _settings(
                read,
                OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{port}",
                OTEL_EXPORTER_OTLP_PROTOCOL=protocol,
            )
        )
        _say_something(telemetry, lines)
        done, took_s = _timed(telemetry.shutdown, 0.5)
    assert done is False
    assert took_s < EXPORT_TIMEOUT_S
