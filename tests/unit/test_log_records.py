"""The short way of a line gives what the long way gives."""

import logging
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk._logs.export import InMemoryLogRecordExporter, SimpleLogRecordProcessor
from opentelemetry.sdk.trace import TracerProvider

from service.config.log_records import PlainRecord, log
from service.config.logging import MAX_TEXT_CHARS
from service.context import RequestContext, current_request
from tests.unit.conftest import Lines

logger = logging.getLogger("somewhere.deep")


class Outputs:
    """What lines and OTLP records are made of logging calls."""

    def __init__(self) -> None:
        self._exporter = InMemoryLogRecordExporter()  # type: ignore[no-untyped-call]  # untyped in the SDK
        self.provider = LoggerProvider(shutdown_on_exit=False)
        self.provider.add_log_record_processor(SimpleLogRecordProcessor(self._exporter))
        self._lines = Lines()
        self._lines.configure("INFO", self.provider)

    @property
    def text(self) -> str:
        """The lines."""
        return self._lines.text

    @property
    def lines(self) -> list[list[tuple[str, Any]]]:
        """The fields of the lines in their order, without the time; the SDK writes lines of its own."""
        ours = [line for line in self._lines.all if not line["logger"].startswith("opentelemetry")]
        return [list(line.items())[1:] for line in ours]

    @property
    def records(self) -> list[dict[str, Any]]:
        """All that stands in the OTLP records, without the times."""
        return [
            {
                **vars(found.log_record),
                "attributes": list((found.log_record.attributes or {}).items()),
                "scope": found.instrumentation_scope,
                "dropped": found.dropped_attributes,
                "timestamp": None,
                "observed_timestamp": None,
            }
            for found in self._exporter.get_finished_logs()
        ]


@pytest.fixture
def outputs() -> Iterator[Outputs]:
    found = Outputs()
    yield found
    found.provider.shutdown()


FIELDS: dict[str, dict[str, Any]] = {
    "none": {},
    "plain": {"text": "t", "number": 3, "share": 0.25, "flag": True, "nothing": None},
    "own user": {"user": "another", "request_id": "another"},
    "list": {"names": ["a", "b"], "n": 1},
    "escaped": {"text": "ünï \u2028 \n \x00 \x7f"},
    "half a surrogate pair": {"text": "a\ud800"},
    "null in a text": {"text": "null"},
    "no number": {"a": float("nan"), "b": float("inf"), "c": -float("inf")},
    "large": {"number": 2**63 - 1, "share": 1e300, "small": 5e-324},
    "long": {"text": "y" * (MAX_TEXT_CHARS + 1)},
    "many": {f"field_{number}": number for number in range(200)},
    "names of a line": {"timestamp": "t", "level": "l", "logger": "g", "trace_id": "i", "n": 1},
    "event": {"otel.event.name": "llmops.something", "n": 1},
    "no name": {"": 1, "n": 2},
}


@pytest.mark.filterwarnings("ignore:Log record attributes were dropped")
@pytest.mark.parametrize("in_a_request", [True, False])
@pytest.mark.parametrize("level", [logging.INFO, logging.WARNING, logging.CRITICAL, 23])
@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_both_ways_give_the_same(
    outputs: Outputs,
    fields: dict[str, Any],
    level: int,
    in_a_request: bool,  # noqa: FBT001 - pytest passes it by name
) -> None:
    request = RequestContext("1" * 32, "inc_" + "2" * 16, client_request_id="theirs", user="somebody")
    token = current_request.set(request if in_a_request else None)
    before = dict(fields)
    with TracerProvider(shutdown_on_exit=False).get_tracer("test").start_as_current_span("outer"):
        logger.log(level, "it_happened", extra=fields)
        log(logger, level, "it_happened", fields)
    current_request.reset(token)
    usual, short = outputs.lines
    assert short == usual
    usual_record, short_record = outputs.records
    assert short_record == usual_record
    assert outputs.text.isascii()
    assert repr(fields) == repr(before)


def test_nothing_is_made_of_what_is_below_the_level(outputs: Outputs) -> None:
    log(logger, logging.DEBUG, "quiet", {"n": 1})
    assert (outputs.lines, outputs.records) == ([], [])


def test_a_field_that_logging_refuses_is_refused() -> None:
    for name in ("message", "levelname", "args"):
        with pytest.raises(KeyError):
            log(logging.getLogger("loud"), logging.CRITICAL, "said", {name: "x"})


def test_the_standard_variables_limit_the_attributes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT", "3")
    outputs = Outputs()
    log(logger, logging.INFO, "it_happened", {"text": "abcdef"})
    outputs.provider.shutdown()
    (record,) = outputs.records
    assert record["attributes"] == [("text", "abc")]


def test_a_disabled_sdk_exports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    outputs = Outputs()
    log(logger, logging.INFO, "it_happened", {"text": "t"})
    outputs.provider.shutdown()
    assert (len(outputs.lines), outputs.records) == (1, [])


def test_a_plain_record_has_what_every_record_has(outputs: Outputs) -> None:
    plain = PlainRecord("somewhere", logging.WARNING, "100% done", {"n": 1})
    usual = logging.makeLogRecord({"name": "somewhere", "levelno": logging.WARNING, "created": plain.created})
    assert vars(usual).keys() <= vars(plain).keys()
    assert (plain.levelname, plain.getMessage()) == ("WARNING", "100% done")
    assert abs(plain.msecs - plain.created % 1 * 1_000) < 1
    assert plain.relativeCreated >= 0
    shown = logging.Formatter("%(name)s %(levelname)s %(lineno)d %(threadName)s %(message)s %(n)s").format(
        plain
    )
    assert shown == "somewhere WARNING 0 None 100% done 1"
    assert outputs.lines == []
