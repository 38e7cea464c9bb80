"""Logging of the whole process: one JSON object per line on stdout, and the same record over OTLP.

``configure_logging`` routes every logger, warning and uncaught exception to both outputs. A logging call
gives a constant message and its fields in ``extra``. ``RecordContext`` adds the ids of the request,
``JsonFormatter`` makes the line, and ``LineWriter`` writes it in a thread of its own.
"""

import json
import logging
import logging.config
import math
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache, lru_cache
from multiprocessing.util import Finalize
from types import TracebackType
from typing import Any, TextIO

import msgspec
from opentelemetry import trace
from opentelemetry.sdk._logs import LoggerProvider

from service.config.log_records import EVENT_NAME, STANDARD_FIELDS, Bridge, PlainRecord, add_request
from service.context import current_request

MAX_TEXT_CHARS = 16_384
"""Maximum length of a string in a log record; the rest is cut off."""

MAX_DEPTH = 8
"""Maximum nesting of an extra field; deeper values are replaced by the name of their type."""

MAX_WAITING_LINES = 10_000
"""Maximum number of lines that wait to be written; further lines are dropped."""

FLUSH_TIMEOUT_S = 1.0
BATCH_DELAY_S = 0.002
"""Time for which the writing thread collects lines before it writes them together. Without it the thread
would take the interpreter lock from the event loop three times per request, 0.1 ms each on a busy machine."""

STDOUT = 1

REQUEST_LOGGERS = ("alembic", "httpx", "httpx2", "httpcore", "httpcore2", "openai", "grpc", "urllib3")
"""Libraries that log every request below WARNING, with its URL or body; Alembic, each of its steps."""

PARSERS = ("python_multipart",)
"""Libraries that log below ERROR what is wrong with a caller's bytes, and quote them; the answer says it."""

NOT_EXPORTED = ("opentelemetry", *REQUEST_LOGGERS)
"""Loggers of the exporters and of the libraries they use. Exporting their records would cause an endless loop
while the collector is down."""

HEADER_PARSER = "opentelemetry.util.re"
BRIDGE_LOGGER = "opentelemetry.instrumentation.logging.handler.internal"
CONTEXT_FIELDS = frozenset({"request_id", "incident_id", "client_request_id", "user"})
"""Fields that every record of a request gets. They are not copied to span events, whose span has them."""

_LEVELS = {"WARN": "WARNING", "FATAL": "CRITICAL"}
_encode = msgspec.json.Encoder().encode


def configure_logging(
    level: str = "INFO", logger_provider: LoggerProvider | None = None, stream: TextIO | None = None
) -> None:
    """Route every logger, warning and uncaught exception of the process to JSON lines.

    A process calls this twice: as early as possible, and again when the settings and the logger provider are
    available.

    Args:
        level: The lowest level that is written and exported.
        logger_provider: Exports the records over OTLP; without one, records are only written.
        stream: Where the lines are written; stdout by default.
    """
    handlers: dict[str, Any] = {
        "stdout": {
            "()": logging.StreamHandler,
            "stream": stream or _stdout_writer(),
            "formatter": "json",
            "filters": ["context"],
        }
    }
    if logger_provider is not None:
        handlers["otlp"] = {
            "()": Bridge,
            "logger_provider": logger_provider,
            "filters": ["exported context"],
        }
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "filters": {
                "context": {"()": RecordContext},
                "exported context": {"()": RecordContext, "excluded": NOT_EXPORTED},
            },
            "formatters": {"json": {"()": JsonFormatter}},
            "handlers": handlers,
            "root": {"level": level, "handlers": list(handlers)},
            # So that no record is made that ``RecordContext`` would refuse.
            "loggers": {
                **{name: {"level": "WARNING"} for name in REQUEST_LOGGERS},
                **{name: {"level": "ERROR"} for name in PARSERS},
            },
        }
    )
    logging.raiseExceptions = False
    # No output shows them: https://docs.python.org/3/howto/logging.html#optimization
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    # The bridge logs its own problems to a plain stderr handler; the root's JSON handler takes them instead.
    bridge = logging.getLogger(BRIDGE_LOGGER)
    bridge.handlers.clear()
    bridge.propagate = True
    logging.captureWarnings(capture=True)
    sys.excepthook = _log_uncaught
    threading.excepthook = _log_thread
    sys.unraisablehook = _log_unraisable


def detach_bridge() -> None:
    """Stop exporting records; called before the logger provider is shut down."""
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, Bridge)]:
        root.removeHandler(handler)


def drain_lines() -> None:
    """Wait until all lines logged so far are written, at most ``FLUSH_TIMEOUT_S``."""
    if _stdout_writer.cache_info().currsize:
        _stdout_writer().drain()


def timestamp(seconds: float | None = None) -> str:
    """Format a Unix time, by default the current time, as ISO 8601 in UTC with milliseconds and ``Z``."""
    whole, millis = divmod(int((time.time() if seconds is None else seconds) * 1000), 1000)
    return f"{_second(whole)}.{millis:03d}Z"


@lru_cache(maxsize=4)
def _second(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")


class RecordContext(logging.Filter):
    """Completes a record in place before a handler formats it: request ids, user, and exception fields.

    Args:
        excluded: Top-level logger names whose records the handler does not get.
    """

    def __init__(self, excluded: tuple[str, ...] = ()) -> None:
        super().__init__()
        self._excluded = frozenset(excluded)

    def filter(self, record: logging.LogRecord) -> bool:
        """Complete the record; False where it is excluded or a request log of a library."""
        if isinstance(record, PlainRecord):
            return True
        library = record.name.split(".", 1)[0]
        if library in self._excluded or (record.levelno < logging.WARNING and library in REQUEST_LOGGERS):
            return False
        if library in PARSERS and record.levelno < logging.ERROR:
            return False
        if record.name == HEADER_PARSER:
            # Its message quotes the header list that it cannot parse, including credentials.
            record.msg, record.args = "A list of header fields in an OTEL_* variable is not valid", ()
        fields = vars(record)
        fields.pop("color_message", None)
        request = current_request.get()
        if request is not None:
            add_request(fields, request)
        if record.exc_info and record.exc_info[1] is not None:
            # asyncio logs the exception of a task that was never awaited when the task is garbage-collected,
            # in the context of an unrelated request.
            never_awaited = record.name == "asyncio"
            if never_awaited:
                # The following lines are the task's repr, which includes the exception's message.
                record.msg, record.args = record.getMessage().split("\n", 1)[0], ()
            with_messages = request is None and not never_awaited
            fields.update(exception_fields(record.exc_info[1], with_messages=with_messages))
            record.exc_info = record.exc_text = None
        return True


def exception_fields(error: BaseException, *, with_messages: bool) -> dict[str, str]:
    """Return the exception's type and stack trace under OpenTelemetry's names.

    Exceptions raised inside a request are shown without their messages, because libraries quote the input
    there, and the input is a prompt. Types, files, lines and source text remain.
    """
    text = "".join(traceback.format_exception(error) if with_messages else _frames_only(error))
    return {"exception.type": _type_name(error), "exception.stacktrace": text[-MAX_TEXT_CHARS:]}


def _type_name(error: BaseException) -> str:
    kind = type(error)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _frames_only(error: BaseException, seen: set[int] | None = None) -> Iterator[str]:
    # Shared by all parts of an exception group: a part that is raised again has its own group as its context.
    seen = set() if seen is None else seen
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        chain.append(cause)
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    for link in reversed(chain):
        yield "Traceback (most recent call last):\n"
        yield from traceback.format_tb(link.__traceback__)
        yield f"{_type_name(link)}\n"
        if isinstance(link, BaseExceptionGroup):
            for inner in link.exceptions:
                yield from _frames_only(inner, seen)


class JsonFormatter(logging.Formatter):
    """Formats a record as one line of JSON: the required fields first, then the record's extra fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without its line feed."""
        if isinstance(record, PlainRecord):
            text = _ascii_json(_required(record, record.msg) | record.fields)
            # Otherwise one of its texts may be too long, or one of its numbers infinite, which became null.
            if text and len(text) <= MAX_TEXT_CHARS and "null" not in text:
                return text
        try:
            message = record.getMessage()
        except Exception:  # noqa: BLE001 - formatting calls arbitrary __str__ methods, and no line may be lost
            message = record.msg if isinstance(record.msg, str) else f"<{type(record.msg).__name__}>"
        line = _required(record, message[:MAX_TEXT_CHARS])
        for name, value in vars(record).items():
            if name not in STANDARD_FIELDS:
                # A required field is never replaced by a library's extra field of the same name.
                line.setdefault("event" if name == EVENT_NAME else name, _json_value(value))
        if record.stack_info:
            line["stack"] = record.stack_info[:MAX_TEXT_CHARS]
        return _ascii_json(line) or json.dumps(line)


def _required(record: logging.LogRecord, message: str) -> dict[str, Any]:
    line = {
        "timestamp": timestamp(record.created),
        "level": _LEVELS.get(record.levelname, record.levelname),
        "message": message,
        "logger": record.name,
    }
    span = trace.get_current_span().get_span_context()
    if span.is_valid:
        line["trace_id"] = trace.format_trace_id(span.trace_id)
        line["span_id"] = trace.format_span_id(span.span_id)
    return line


def _ascii_json(line: dict[str, Any]) -> str:
    """The line as JSON, or nothing where characters have to be escaped.

    ASCII only: neither the encoding of stdout nor a lone surrogate nor U+2028 can break the line.
    """
    try:
        # With spaces, as ``json`` writes them: people search for '"trace_id": "…"'.
        encoded = msgspec.json.format(_encode(line), indent=0)
    except (ValueError, TypeError):
        return ""
    return encoded.decode("ascii") if encoded.isascii() else ""


def _json_value(value: object, depth: int = MAX_DEPTH) -> object:
    """Convert a value for JSON: strings are cut, unsupported or too deep values become their type's name."""
    match value:
        case str():
            return value[:MAX_TEXT_CHARS]
        case None | bool() | int():
            return value
        case float():
            return value if math.isfinite(value) else str(value)
        case dict() if depth:
            return {
                str(name): _json_value(inner, depth - 1)
                for name, inner in value.items()
                if isinstance(name, str)
            }
        case list() | tuple() if depth:
            return [_json_value(inner, depth - 1) for inner in value]
        case _:
            return f"<{type(value).__name__}>"


class LineWriter:
    """A stream for a logging handler that accepts text without blocking and writes it in a thread.

    If the reader of a pipe stops reading, a blocking write would stop the event loop. The thread writes to
    the file descriptor, so that there is no buffer left to flush when the interpreter exits.

    Args:
        descriptor: The file descriptor to write to.
        max_lines: Maximum number of waiting lines; further lines are dropped.
    """

    def __init__(self, descriptor: int = STDOUT, max_lines: int = MAX_WAITING_LINES) -> None:
        self._descriptor = descriptor
        self._waiting: queue.SimpleQueue[str | threading.Event] = queue.SimpleQueue()
        self._max_lines = max_lines
        threading.Thread(target=self._write_batches, name="log lines", daemon=True).start()
        # Unlike atexit, this also runs at the end of a multiprocessing worker.
        Finalize(None, self.drain, exitpriority=0)

    def write(self, text: str) -> None:
        """Accept a text, or drop it where too many are waiting; never blocks."""
        if self._waiting.qsize() < self._max_lines:
            self._waiting.put(text)

    def flush(self) -> None:
        """Do nothing: a handler calls this after each line."""

    def drain(self, timeout_s: float = FLUSH_TIMEOUT_S) -> None:
        """Wait until all lines accepted so far are written, or the time limit is over."""
        written = threading.Event()
        self._waiting.put(written)
        written.wait(timeout_s)

    def _write_batches(self) -> None:
        while True:
            batch = [self._waiting.get()]
            time.sleep(BATCH_DELAY_S)
            with suppress(queue.Empty):
                # Bounded, as more lines may come while these are taken.
                while len(batch) < self._max_lines:
                    batch.append(self._waiting.get_nowait())
            data = "".join(text for text in batch if isinstance(text, str)).encode("utf-8", "replace")
            # With a full disk or a closed pipe the lines are lost and the process goes on.
            with suppress(OSError):
                while data:
                    data = data[os.write(self._descriptor, data) :]
            for text in batch:
                if isinstance(text, threading.Event):
                    text.set()


@cache
def _stdout_writer() -> LineWriter:
    return LineWriter()


def _log_uncaught(
    kind: type[BaseException], error: BaseException, where: TracebackType | None
) -> None:  # pragma: no cover - runs when the interpreter exits; covered by a subprocess test
    logging.getLogger("service").critical("Uncaught exception", exc_info=(kind, error, where))


def _log_thread(event: threading.ExceptHookArgs) -> None:
    if event.exc_value is not None and not isinstance(event.exc_value, SystemExit):
        logging.getLogger("service").error("Uncaught exception in a thread", exc_info=event.exc_value)


def _log_unraisable(event: "sys.UnraisableHookArgs") -> None:
    logging.getLogger("service").error("Exception ignored in a finaliser", exc_info=event.exc_value)
