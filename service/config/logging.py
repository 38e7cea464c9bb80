"""Every line of the process is one JSON object on stdout; the same record goes to OTLP through the bridge.

A logging call gives a constant message and keyword fields (``extra``); inside a request the ids of the trace,
the user and the caller's own id are added here, once for both outputs.
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
from functools import cache
from multiprocessing.util import Finalize
from types import TracebackType
from typing import Any, TextIO

from opentelemetry import trace
from opentelemetry.instrumentation.logging.handler import LoggingHandler
from opentelemetry.sdk._logs import LoggerProvider

from service.context import current_request

MAX_LINES = 10_000
"""Lines that wait at most, while nobody reads; further ones are dropped and counted."""

FLUSH_LIMIT_S = 1.0
PAUSE_S = 0.002
"""So long the thread lets further lines come before it writes them together. Waking it for each line would
take the interpreter from the event loop three times a request: 0.1 ms each on a busy machine."""

STDOUT = 1


class LineWriter:
    """A stream for a logging handler: takes text at once, and writes it when the other side reads.

    A pipe whose reader has stopped would otherwise stop the event loop at the next line. Writing goes to the
    file descriptor: there is no buffer left that could fail when the interpreter ends.

    Args:
        descriptor: The file descriptor to write to.
        max_lines: Lines that may wait.
    """

    def __init__(self, descriptor: int = STDOUT, max_lines: int = MAX_LINES) -> None:
        self._descriptor = descriptor
        self._waiting: queue.SimpleQueue[str | threading.Event] = queue.SimpleQueue()
        self._max_lines = max_lines
        self._dropped = 0
        self._writing = threading.Thread(target=self._write, name="log lines", daemon=True)
        self._writing.start()
        # Unlike atexit, this runs at the end of a worker process too.
        Finalize(None, self.drain, exitpriority=0)

    @property
    def dropped(self) -> int:
        """Lines lost so far because nobody read."""
        return self._dropped

    def write(self, text: str) -> None:
        """Take a text; never waits."""
        if self._waiting.qsize() >= self._max_lines:
            self._dropped += 1
        else:
            self._waiting.put(text)

    def flush(self) -> None:
        """Nothing to do: a handler calls this after each line."""

    def drain(self, limit_s: float = FLUSH_LIMIT_S) -> None:
        """Wait until all lines so far are written, or the time is over."""
        written = threading.Event()
        self._waiting.put(written)
        written.wait(limit_s)

    def _write(self) -> None:
        while True:
            taken = [self._waiting.get()]
            time.sleep(PAUSE_S)
            with suppress(queue.Empty):
                while True:
                    taken.append(self._waiting.get_nowait())
            data = "".join(text for text in taken if isinstance(text, str)).encode("utf-8", "replace")
            # A full disk or a reader who left: the line is lost, the process goes on.
            with suppress(OSError):
                while data:
                    data = data[os.write(self._descriptor, data) :]
            for text in taken:
                if isinstance(text, threading.Event):
                    text.set()


MAX_TEXT = 16_384
"""Longest string of a log record, in characters; what is over is cut."""

QUIET = ("httpx", "httpx2", "httpcore", "httpcore2", "openai", "grpc", "urllib3")
"""Libraries that log each request below WARNING, with URLs or bodies in it."""

MAX_DEPTH = 8
"""Deepest nesting of an extra field; what is below is named by its type."""

NOT_EXPORTED = ("opentelemetry", *QUIET)
"""What an exporter uses or says itself: sent over OTLP, it would feed itself while the collector is down."""

HEADER_PARSER = "opentelemetry.util.re"
EVENT_NAME = "otel.event.name"
CONTEXT_FIELDS = frozenset({"request_id", "client_request_id", "user"})
"""What a record gets from the request that it was made in; a span has these already."""

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}
_LEVELS = {"WARN": "WARNING", "FATAL": "CRITICAL"}


def timestamp(seconds: float | None = None) -> str:
    """A moment (Unix time; without one: now) as ISO 8601 in UTC with milliseconds and ``Z``."""
    moment = datetime.now(UTC) if seconds is None else datetime.fromtimestamp(seconds, UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03d}Z"


class RecordContext(logging.Filter):
    """Completes a record in place, before any handler formats it: ids, user, and the exception as fields."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Drop what a quiet library says below WARNING; complete the rest."""
        if record.levelno < logging.WARNING and record.name.split(".", 1)[0] in QUIET:
            return False
        if record.name == HEADER_PARSER:
            # It quotes the header field that it cannot read, credential and all.
            record.msg, record.args = "A list of header fields in an OTEL_* variable is not valid", ()
        vars(record).pop("color_message", None)
        request = current_request.get()
        if request is not None:
            record.request_id = request.request_id
            if request.user is not None and not hasattr(record, "user"):
                record.user = request.user
            if request.client_request_id is not None:
                record.client_request_id = request.client_request_id
        if record.exc_info and record.exc_info[1] is not None:
            # A task that nobody awaited is logged when it is collected, in anybody's context.
            lost = record.name == "asyncio"
            if lost:
                # The rest is the repr of the task, with that of its exception in it.
                record.msg, record.args = record.getMessage().split("\n", 1)[0], ()
            with_messages = request is None and not lost
            fields = exception_fields(record.exc_info[1], with_messages=with_messages)
            vars(record).update(fields)
            record.exc_info = record.exc_text = None
        return True


def exception_fields(error: BaseException, *, with_messages: bool) -> dict[str, str]:
    """The exception's type and stack trace under OpenTelemetry's names.

    Inside a request the exceptions' messages stay out: libraries put the input that they choked on there, and
    the input is somebody's prompt. Types, files, lines and source text remain.
    """
    text = "".join(traceback.format_exception(error) if with_messages else _frames_only(error))
    return {"exception.type": _type_name(error), "exception.stacktrace": text[-MAX_TEXT:]}


def _type_name(error: BaseException) -> str:
    kind = type(error)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _frames_only(error: BaseException, seen: set[int] | None = None) -> Iterator[str]:
    # Shared with the parts of a group: one that is raised again has its own group as context.
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
    """One record as one line of JSON: the required fields first, then the record's own, in their order."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its line feed."""
        line: dict[str, Any] = {
            "timestamp": timestamp(record.created),
            "level": _LEVELS.get(record.levelname, record.levelname),
            "message": _message(record)[:MAX_TEXT],
            "logger": record.name,
        }
        span = trace.get_current_span().get_span_context()
        if span.is_valid:
            line["trace_id"] = trace.format_trace_id(span.trace_id)
            line["span_id"] = trace.format_span_id(span.span_id)
        for name, value in vars(record).items():
            if name not in _STANDARD:
                # What is there already is required: a library's field of that name does not replace it.
                line.setdefault("event" if name == EVENT_NAME else name, _plain(value))
        if record.stack_info:
            line["stack"] = record.stack_info[:MAX_TEXT]
        # ASCII alone: no encoding of stdout, no lone surrogate and no U+2028 can break or lose the line.
        return json.dumps(line)


def _message(record: logging.LogRecord) -> str:
    """The message; of a call whose arguments do not fit, its constant part: a line is never lost."""
    try:
        return record.getMessage()
    except Exception:  # noqa: BLE001 - formatting runs anybody's code
        return record.msg if isinstance(record.msg, str) else f"<{type(record.msg).__name__}>"


def _plain(value: object, depth: int = MAX_DEPTH) -> object:
    """The value as JSON can hold it: texts cut, and what is no JSON, or too deep, named by its type."""
    match value:
        case str():
            return value[:MAX_TEXT]
        case None | bool() | int():
            return value
        case float():
            return value if math.isfinite(value) else str(value)
        case dict() if depth:
            return {
                str(name): _plain(inner, depth - 1) for name, inner in value.items() if isinstance(name, str)
            }
        case list() | tuple() if depth:
            return [_plain(inner, depth - 1) for inner in value]
        case _:
            return f"<{type(value).__name__}>"


class ExportFilter(logging.Filter):
    """Keeps off the bridge what the exporters themselves cause."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record may be exported."""
        return record.name.split(".", 1)[0] not in NOT_EXPORTED


def configure_logging(
    level: str = "INFO", logger_provider: LoggerProvider | None = None, stream: TextIO | None = None
) -> None:
    """Route every logger, warning and uncaught exception of the process to JSON lines.

    Called twice in a process's life: at once, so that no line escapes, and again when the settings and the
    OTLP bridge are there.

    Args:
        level: The lowest level that is written and exported.
        logger_provider: Where the bridge sends records; none, no bridge.
        stream: Where the lines go; stdout when not given.
    """
    handlers: dict[str, Any] = {
        "stdout": {
            "()": logging.StreamHandler,
            "stream": stream or _stdout(),
            "formatter": "json",
            "filters": ["context"],
        }
    }
    if logger_provider is not None:
        handlers["otlp"] = {
            "()": LoggingHandler,
            "logger_provider": logger_provider,
            "filters": ["export", "context"],
        }
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "filters": {"context": {"()": RecordContext}, "export": {"()": ExportFilter}},
            "formatters": {"json": {"()": JsonFormatter}},
            "handlers": handlers,
            "root": {"level": level, "handlers": list(handlers)},
        }
    )
    logging.raiseExceptions = False
    # The bridge's own complaints go to a bare stderr handler; the root's JSON handler takes them instead.
    bridge = logging.getLogger("opentelemetry.instrumentation.logging.handler.internal")
    bridge.handlers.clear()
    bridge.propagate = True
    logging.captureWarnings(capture=True)
    sys.excepthook = _log_uncaught
    threading.excepthook = _log_thread
    sys.unraisablehook = _log_unraisable


@cache
def _stdout() -> LineWriter:
    return LineWriter()


def drain_lines() -> None:
    """Wait until what was logged so far is written, or a second is over."""
    if _stdout.cache_info().currsize:
        _stdout().drain()


def detach_bridge() -> None:
    """Stop sending records to OTLP, before the provider behind the bridge is shut down."""
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, LoggingHandler)]:
        root.removeHandler(handler)


def _log_uncaught(
    kind: type[BaseException], error: BaseException, where: TracebackType | None
) -> None:  # pragma: no cover - runs when the interpreter is on its way out; shown by a subprocess test
    logging.getLogger("service").critical("Uncaught exception", exc_info=(kind, error, where))


def _log_thread(event: threading.ExceptHookArgs) -> None:
    if event.exc_value is not None and not isinstance(event.exc_value, SystemExit):
        logging.getLogger("service").error("Uncaught exception in a thread", exc_info=event.exc_value)


def _log_unraisable(event: "sys.UnraisableHookArgs") -> None:
    logging.getLogger("service").error("Exception ignored in a finaliser", exc_info=event.exc_value)
