"""Emits events: one call writes a log line, an OTLP log record, and a span event on the current span.

A module of its own, because every layer emits events and only ``providers`` installs the processor.
"""

import logging
from collections.abc import Mapping

from opentelemetry import trace
from opentelemetry.sdk._logs import LogRecordProcessor, ReadWriteLogRecord
from opentelemetry.util.types import AttributeValue

from service.config.log_records import EVENT_NAME
from service.config.logging import CONTEXT_FIELDS
from service.errors import ErrorFacts, InternalError, ServiceError
from service.telemetry import names


def emit(
    logger: logging.Logger,
    event: str,
    message: str,
    fields: Mapping[str, AttributeValue],
    *,
    level: int = logging.INFO,
) -> None:
    """Emit an event.

    Args:
        logger: The logger of the calling module.
        event: A name of ``telemetry.names.EVENTS``.
        message: The message of the log line.
        fields: The event's attributes.
        level: A level of ``logging``.
    """
    logger.log(level, message, extra={EVENT_NAME: event, **fields})


def upstream_fields(error: BaseException | None) -> dict[str, str | int]:
    """What the upstream said or did, as attributes of an attempt's span and of log lines."""
    if not isinstance(error, ServiceError):
        return {}
    fields = {
        names.ATTR_UPSTREAM_CAUSE: None if error.cause is None else error.cause.value,
        names.ATTR_UPSTREAM_STATUS: error.upstream_status,
        names.ATTR_UPSTREAM_CODE: error.upstream_code,
    }
    return {name: value for name, value in fields.items() if value is not None}


def error_fields(facts: ErrorFacts) -> dict[str, AttributeValue]:
    """What an error's body says, as fields of a log line; ``error``, its name, is not among them."""
    fields: dict[str, AttributeValue | None] = {
        names.ATTR_ERROR_MESSAGE: facts.message,
        names.ATTR_ERROR_FAULT: facts.fault.value,
        names.ATTR_ERROR_RETRY: facts.retry,
        names.ATTR_ERROR_RETRY_AFTER: facts.retry_after_s,
        names.ATTR_ERROR_CODE: facts.code,
        names.ATTR_ERROR_PARAM: facts.param,
        names.ATTR_ERROR_FIELDS: facts.fields or None,
        names.ATTR_UPSTREAM_CAUSE: facts.cause,
        names.ATTR_UPSTREAM_STATUS: facts.upstream_status,
        names.ATTR_UPSTREAM_CODE: facts.upstream_code,
    }
    return {name: value for name, value in fields.items() if value is not None}


def failure_fields(error: BaseException | None) -> dict[str, AttributeValue]:
    """The same of what ended a call; of a caller who left, or without an error, nothing."""
    if isinstance(error, ServiceError):
        return error_fields(error.facts())
    return error_fields(InternalError().facts()) if isinstance(error, Exception) else {}


class SpanEventProcessor(LogRecordProcessor):
    """Adds each log record that is an event to the current span as a span event.

    The specification describes such a processor ("event to span event"), but the Python SDK has none yet.
    Only records with an event name that were made in the span that is recording now are added.
    """

    def on_emit(self, log_record: ReadWriteLogRecord) -> None:
        """Add the record to the current span if it is an event of that span."""
        record = log_record.log_record
        if not record.event_name:
            return
        span = trace.get_current_span()
        context = span.get_span_context()
        if not span.is_recording() or (record.trace_id, record.span_id) != (
            context.trace_id,
            context.span_id,
        ):
            return
        attributes = {
            name: value
            for name, value in (record.attributes or {}).items()
            if name not in CONTEXT_FIELDS and isinstance(value, (str, bool, int, float))
        }
        span.add_event(record.event_name, attributes, timestamp=record.timestamp)

    def shutdown(self) -> None:
        """Do nothing: the processor buffers nothing."""

    def force_flush(self, timeout_millis: int = 30_000) -> bool:  # noqa: ARG002 - the SDK's interface
        """Do nothing: the processor buffers nothing."""
        return True
