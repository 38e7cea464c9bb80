"""Log records whose fields need no conversion: a short way for the lines that every call writes.

``log`` makes a ``PlainRecord`` and passes it to the handlers, which know it: the one that formats it, and
``Bridge``, which hands it to the SDK. Other fields go the way of all other records, with the same result.
"""

import logging
import time
from collections.abc import Mapping
from types import NoneType
from typing import Any, Final, Self

from opentelemetry._logs import LogRecord, get_logger
from opentelemetry.instrumentation.log_utils import std_to_otel
from opentelemetry.instrumentation.logging.handler import LoggingHandler
from opentelemetry.sdk._logs import Logger, LoggerProvider, LogRecordLimits, ReadWriteLogRecord
from opentelemetry.util.types import AttributeValue

from service.context import RequestContext, current_request

EVENT_NAME: Final = "otel.event.name"
EMPTY_RECORD: Final = vars(logging.makeLogRecord({})) | dict.fromkeys(
    ("thread", "threadName", "process", "processName", "taskName")
)
STANDARD_FIELDS: Final = frozenset(EMPTY_RECORD) | {
    "message",
    "asctime",
    "color_message",
}
"""Attributes of a record that are not among its fields."""

PLAIN: Final = frozenset({str, int, float, bool, NoneType})
"""Types that need no conversion, neither for JSON nor for OTLP."""

SPECIAL_FIELDS: Final = STANDARD_FIELDS | {
    "timestamp",
    "level",
    "logger",
    "trace_id",
    "span_id",
    EVENT_NAME,
    "",
}
"""Fields that ``logging`` refuses, or that lines or OTLP records do not have under their own name."""

SEVERITY_TEXTS: Final = {"WARNING": "WARN", "CRITICAL": "FATAL"}
"""OpenTelemetry's names of levels, where Python has others."""


def log(
    logger: logging.Logger, level: int, message: str, fields: Mapping[str, AttributeValue | None]
) -> None:
    """Log a message with fields, as ``logger.log`` does with ``extra``, in less time.

    Args:
        logger: The logger of the calling module.
        level: A level of ``logging``.
        message: The message, which is not formatted.
        fields: The fields of the line.
    """
    if not logger.isEnabledFor(level):
        return
    if PLAIN.issuperset(map(type, fields.values())) and SPECIAL_FIELDS.isdisjoint(fields):
        logger.handle(PlainRecord(logger.name, level, message, dict(fields)))
    else:
        logger.log(level, message, extra=fields)


class PlainRecord(logging.LogRecord):
    """A record whose fields are complete and need no conversion.

    It does not say from which line, thread and process it comes: no output shows them.

    Args:
        name: Name of the logger.
        level: A level of ``logging``.
        message: The message.
        fields: The fields; those of the request at hand are added.
    """

    __slots__ = ("fields",)

    def __init__(self, name: str, level: int, message: str, fields: dict[str, Any]) -> None:
        request = current_request.get()
        if request is not None:
            add_request(fields, request)
        self.fields = fields
        # The base class looks up more than is shown, which takes as long as all of this. The fields are also
        # attributes, for handlers that do not know this class.
        self.__dict__ = attributes = EMPTY_RECORD | fields
        created = time.time()
        attributes["name"] = name
        attributes["levelno"] = level
        attributes["levelname"] = logging.getLevelName(level)
        attributes["msg"] = message
        attributes["created"] = created
        attributes["msecs"] = created % 1 * 1_000
        attributes["relativeCreated"] += (created - EMPTY_RECORD["created"]) * 1_000


def add_request(fields: dict[str, Any], request: RequestContext) -> None:
    """Add the ids of a request, and who is calling."""
    fields["request_id"] = request.request_id
    # On every line, as the first ones of a request are written before it fails.
    fields["incident_id"] = request.incident_id
    if request.user is not None:
        fields.setdefault("user", request.user)
    if request.client_request_id is not None:
        fields["client_request_id"] = request.client_request_id


class Bridge(LoggingHandler):
    """OpenTelemetry's bridge, with a short way for plain records.

    Args:
        logger_provider: Makes the loggers that export the records.
    """

    def __init__(self, logger_provider: LoggerProvider) -> None:
        super().__init__(logger_provider=logger_provider)
        self._provider = logger_provider
        self._loggers: dict[str, Logger] = {}
        self._limits = LogRecordLimits()
        cut = self._limits.max_log_record_attribute_length is not None
        self._max_fields = 0 if cut else self._limits.max_log_record_attributes or 0

    def emit(self, record: logging.LogRecord) -> None:
        """Hand the record to the SDK's logger of the same name."""
        if not isinstance(record, PlainRecord) or len(record.fields) > self._max_fields:
            super().emit(record)
            return
        logger = self._loggers.get(record.name) or get_logger(record.name, logger_provider=self._provider)
        # With ``OTEL_SDK_DISABLED`` it is one that does nothing.
        if isinstance(logger, Logger):
            self._loggers[record.name] = logger
            exported = _ExportedRecord(
                timestamp=int(record.created * 1e9),
                severity_text=SEVERITY_TEXTS.get(record.levelname, record.levelname),
                severity_number=std_to_otel(record.levelno),
                body=record.msg,
                attributes=record.fields,
            )
            plain = _PlainLogRecord(exported, logger.resource, logger.instrumentation_scope, self._limits)
            logger.emit(plain)  # type: ignore[arg-type]  # the SDK takes its own records, too


class _ExportedRecord(LogRecord):
    """A log record that only the batch processor keeps, so that this one needs no copy."""

    def __copy__(self) -> Self:
        return self


class _PlainLogRecord(ReadWriteLogRecord):
    """A log record whose attributes are within the limits and need no conversion."""

    def __post_init__(self) -> None:
        """Leave the attributes as they are; the base class checks and copies each of them."""
