"""One logging call is one line and one OTLP record with the same facts."""

import logging
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry._logs import SeverityNumber
from opentelemetry.sdk._logs import LoggerProvider, ReadableLogRecord
from opentelemetry.sdk._logs.export import InMemoryLogRecordExporter, SimpleLogRecordProcessor
from opentelemetry.sdk.trace import TracerProvider

from service.config.logging import NOT_EXPORTED, detach_bridge
from service.context import RequestContext, current_request
from tests.unit.conftest import Lines

logger = logging.getLogger("somewhere.deep")


class Bridged:
    """A bridge into memory, and the lines beside it."""

    def __init__(self) -> None:
        self._exporter = InMemoryLogRecordExporter()  # type: ignore[no-untyped-call]  # untyped in the SDK
        self.provider = LoggerProvider(shutdown_on_exit=False)
        self.provider.add_log_record_processor(SimpleLogRecordProcessor(self._exporter))
        self.lines = Lines()
        self.lines.configure(provider=self.provider)

    @property
    def all(self) -> list[ReadableLogRecord]:
        """The records sent so far."""
        return list(self._exporter.get_finished_logs())

    @property
    def one(self) -> Any:
        """The only record."""
        (found,) = self.all
        return found.log_record


@pytest.fixture
def bridged() -> Iterator[Bridged]:
    found = Bridged()
    yield found
    found.provider.shutdown()


@pytest.mark.parametrize(
    ("level", "number", "text"),
    [
        (logging.DEBUG, SeverityNumber.DEBUG, "DEBUG"),
        (logging.INFO, SeverityNumber.INFO, "INFO"),
        (logging.WARNING, SeverityNumber.WARN, "WARN"),
        (logging.ERROR, SeverityNumber.ERROR, "ERROR"),
        (logging.CRITICAL, SeverityNumber.FATAL, "FATAL"),
    ],
)
def test_a_record_has_the_severity_of_its_level(
    bridged: Bridged, level: int, number: SeverityNumber, text: str
) -> None:
    logger.log(level, "said")
    assert (bridged.one.severity_number, bridged.one.severity_text) == (number, text)
    assert bridged.lines.one["level"] == logging.getLevelName(level)


def test_a_record_has_the_lines_facts(bridged: Bridged) -> None:
    tracer = TracerProvider(shutdown_on_exit=False).get_tracer("test")
    request = RequestContext("1" * 32, "inc_" + "2" * 16, client_request_id="theirs", user="somebody")
    token = current_request.set(request)
    with tracer.start_as_current_span("outer") as span:
        logger.info("said by %s", "us", extra={"text": "t", "number": 3, "flag": True, "list": ["a", "b"]})
    current_request.reset(token)

    record, line = bridged.one, bridged.lines.one
    assert (record.body, record.event_name) == ("said by us", None)
    context = span.get_span_context()
    assert (record.trace_id, record.span_id) == (context.trace_id, context.span_id)
    assert line["trace_id"] == f"{record.trace_id:032x}"
    extras = {
        "text": "t",
        "number": 3,
        "flag": True,
        "list": ["a", "b"],
        "request_id": "1" * 32,
        "incident_id": "inc_" + "2" * 16,
        "user": "somebody",
        "client_request_id": "theirs",
    }
    seen = {name: record.attributes[name] for name in extras}
    assert seen | {"list": list(seen["list"])} == extras
    assert {name: line[name] for name in extras} == extras
    assert bridged.all[0].instrumentation_scope is not None
    assert bridged.all[0].instrumentation_scope.name == "somewhere.deep"


def test_a_record_outside_a_span_has_no_ids(bridged: Bridged) -> None:
    logger.info("said")
    assert not bridged.one.trace_id
    assert not bridged.one.span_id


def test_an_event_has_its_name(bridged: Bridged) -> None:
    logger.info("said", extra={"otel.event.name": "llmops.something", "n": 1})
    assert bridged.one.event_name == "llmops.something"
    assert bridged.one.attributes["n"] == 1
    assert "otel.event.name" not in bridged.one.attributes
    assert bridged.lines.one["event"] == "llmops.something"


@pytest.mark.parametrize("in_a_request", [True, False])
def test_an_exception_is_the_same_on_both_sides(bridged: Bridged, in_a_request: bool) -> None:  # noqa: FBT001 - pytest passes it by name
    token = current_request.set(RequestContext("1" * 32, "inc_x") if in_a_request else None)
    try:
        int("can" + "ary")
    except ValueError:
        logger.exception("it_failed")
    current_request.reset(token)
    attributes, line = bridged.one.attributes, bridged.lines.one
    for name in ("exception.type", "exception.stacktrace"):
        assert attributes[name] == line[name]
    assert attributes["exception.type"] == "ValueError"
    shown = "canary" in str(dict(attributes)), "canary" in bridged.lines.text
    assert shown == (not in_a_request, not in_a_request)


@pytest.mark.parametrize("name", [name for name in NOT_EXPORTED if "." not in name])
def test_what_exporting_causes_is_written_but_not_exported(bridged: Bridged, name: str) -> None:
    logging.getLogger(name).error("trouble")
    logging.getLogger(f"{name}.exporter").error("trouble")
    assert len(bridged.lines.all) == 2
    assert bridged.all == []


def test_uvicorns_coloured_copy_is_left_out(bridged: Bridged) -> None:
    logger.info("said", extra={"color_message": "\x1b[1msaid\x1b[0m"})
    assert "color_message" not in bridged.one.attributes
    assert "color_message" not in bridged.lines.one


def test_a_similar_name_is_exported(bridged: Bridged) -> None:
    logging.getLogger("opentelemetrys").error("said")
    assert bridged.one.body == "said"


def test_the_bridges_own_complaints_are_lines(bridged: Bridged) -> None:
    logging.getLogger("opentelemetry.instrumentation.logging.handler.internal").warning("trouble")
    assert bridged.lines.one["message"] == "trouble"
    assert bridged.all == []


def test_the_level_holds_for_both_sides() -> None:
    bridged = Bridged()
    bridged.lines.configure("ERROR", bridged.provider)
    logger.warning("quiet")
    logger.error("loud")
    assert (bridged.one.body, bridged.lines.one["message"]) == ("loud", "loud")
    bridged.provider.shutdown()


def test_after_detaching_lines_go_on_and_records_stop(bridged: Bridged) -> None:
    detach_bridge()
    logger.info("said")
    detach_bridge()
    assert bridged.lines.one["message"] == "said"
    assert bridged.all == []


def test_configuring_again_does_not_double_anything(bridged: Bridged) -> None:
    bridged.lines.configure(provider=bridged.provider)
    logger.info("said")
    assert len(bridged.lines.all) == len(bridged.all) == 1
