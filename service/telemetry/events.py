"""One emission, seen three times: as JSON line, as OTLP log record, and as event of the span at hand."""

import logging
from collections.abc import Mapping

from opentelemetry import trace
from opentelemetry.sdk._logs import LogRecordProcessor, ReadWriteLogRecord
from opentelemetry.util.types import AttributeValue

from service.config.logging import CONTEXT_FIELDS, EVENT_NAME


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
        logger: The logger of the module where it happens.
        event: A name of ``telemetry.names.EVENTS``.
        message: The line that people search for, verbatim.
        fields: The event's attributes.
        level: The severity, a level of ``logging``.
    """
    logger.log(level, message, extra={EVENT_NAME: event, **fields})


class SpanEventProcessor(LogRecordProcessor):
    """Adds a log record that is an event to the span at hand as a span event.

    The specification names such a processor ("event to span event"); the Python SDK has none yet. Only a
    record with an event name, made inside the very span that is recording now, is bridged.
    """

    def on_emit(self, log_record: ReadWriteLogRecord) -> None:
        """Bridge the record where it is an event of the current span."""
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
        """Nothing is held."""

    def force_flush(self, timeout_millis: int = 30_000) -> bool:  # noqa: ARG002 - the interface's signature
        """Nothing is held."""
        return True
