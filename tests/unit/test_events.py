"""One emission is a line, an OTLP record and an event of the span at hand; anything else is not the last."""

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from opentelemetry import trace
from opentelemetry._logs import SeverityNumber
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk._logs.export import InMemoryLogRecordExporter, SimpleLogRecordProcessor
from opentelemetry.sdk.trace import Event, ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

from service.telemetry.events import SpanEventProcessor, emit
from tests.unit.conftest import Lines

if TYPE_CHECKING:
    from opentelemetry.util.types import AttributeValue

logger = logging.getLogger("service.somewhere")


class Signals:
    """Lines, records and spans of one test."""

    def __init__(self) -> None:
        self.spans_out = InMemorySpanExporter()
        self.logs_out = InMemoryLogRecordExporter()  # type: ignore[no-untyped-call]  # untyped in the SDK
        self.tracer_provider = TracerProvider(shutdown_on_exit=False)
        self.tracer_provider.add_span_processor(SimpleSpanProcessor(self.spans_out))
        self.tracer = self.tracer_provider.get_tracer("test")
        self.logger_provider = LoggerProvider(shutdown_on_exit=False)
        self.logger_provider.add_log_record_processor(SpanEventProcessor())
        self.logger_provider.add_log_record_processor(SimpleLogRecordProcessor(self.logs_out))
        self.lines = Lines()
        self.lines.configure("INFO", self.logger_provider)

    def events(self, name: str) -> list[Event]:
        """The events of the one finished span with this name."""
        found: list[ReadableSpan] = [
            span for span in self.spans_out.get_finished_spans() if span.name == name
        ]
        (span,) = found
        return list(span.events)


@pytest.fixture
def signals() -> Iterator[Signals]:
    found = Signals()
    yield found
    found.logger_provider.shutdown()
    found.tracer_provider.shutdown()


def test_one_emission_is_seen_three_times(signals: Signals) -> None:
    fields: dict[str, AttributeValue] = {
        "attempt": 1,
        "delay_s": 1.2,
        "final": False,
        "reason": "timeout",
        "error.type": "UpstreamError",
    }
    with signals.tracer.start_as_current_span("work"):
        emit(
            logger,
            "llmops.retry.scheduled",
            "Retrying in 1.2s...",
            fields,
            level=logging.WARNING,
        )

    line = signals.lines.one
    (found,) = signals.logs_out.get_finished_logs()
    record = found.log_record
    (event,) = signals.events("work")
    assert (line["event"], line["message"], line["level"]) == (
        "llmops.retry.scheduled",
        "Retrying in 1.2s...",
        "WARNING",
    )
    assert {name: line[name] for name in fields} == fields
    assert (record.event_name, record.body) == ("llmops.retry.scheduled", "Retrying in 1.2s...")
    assert record.severity_number is SeverityNumber.WARN
    assert fields.items() <= dict(record.attributes or {}).items()
    assert event.name == "llmops.retry.scheduled"
    assert fields.items() <= dict(event.attributes or {}).items()
    assert event.timestamp == record.timestamp


def test_the_innermost_span_alone_gets_the_event(signals: Signals) -> None:
    with signals.tracer.start_as_current_span("outer"), signals.tracer.start_as_current_span("inner"):
        emit(logger, "llmops.something", "said", {})
    assert [event.name for event in signals.events("inner")] == ["llmops.something"]
    assert signals.events("outer") == []


def test_a_plain_line_is_no_event(signals: Signals) -> None:
    with signals.tracer.start_as_current_span("work"):
        logger.warning("said", extra={"n": 1})
    assert signals.events("work") == []
    assert len(signals.logs_out.get_finished_logs()) == 1


def test_an_event_below_the_level_is_seen_nowhere(signals: Signals) -> None:
    with signals.tracer.start_as_current_span("work"):
        emit(logger, "llmops.something", "said", {}, level=logging.DEBUG)
    assert signals.events("work") == []
    assert signals.lines.all == []


def test_outside_a_span_an_event_is_a_line_and_a_record(signals: Signals) -> None:
    emit(logger, "llmops.something", "said", {})
    (found,) = signals.logs_out.get_finished_logs()
    assert found.log_record.event_name == "llmops.something"
    assert signals.lines.one["event"] == "llmops.something"


def test_a_span_that_ended_is_left_alone(signals: Signals) -> None:
    span = signals.tracer.start_span("work")
    with trace.use_span(span, end_on_exit=False):
        span.end()
        # The SDK would log "Setting an event on an ended span".
        emit(logger, "llmops.something", "said", {})
    assert signals.events("work") == []
    assert [line["message"] for line in signals.lines.all] == ["said"]


def test_a_span_that_does_not_record_is_left_alone(signals: Signals) -> None:
    off = TracerProvider(sampler=ALWAYS_OFF, shutdown_on_exit=False).get_tracer("test")
    with off.start_as_current_span("unrecorded") as span:
        emit(logger, "llmops.something", "said", {})
    (found,) = signals.logs_out.get_finished_logs()
    assert found.log_record.trace_id == span.get_span_context().trace_id
    assert signals.lines.one["event"] == "llmops.something"


def test_an_event_made_in_another_span_does_not_reach_this_one(signals: Signals) -> None:
    with signals.tracer.start_as_current_span("theirs") as theirs:
        other = trace.set_span_in_context(theirs)
    with signals.tracer.start_as_current_span("ours"):
        signals.logger_provider.get_logger("test").emit(
            event_name="llmops.something", body="said", context=other
        )
    assert signals.events("ours") == []
    assert len(signals.logs_out.get_finished_logs()) == 1
