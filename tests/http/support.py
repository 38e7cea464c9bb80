"""What the HTTP tests share: waiting, raw sockets, an app for a whole module, trace contexts."""

import json
import logging
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from opentelemetry.sdk.metrics.export import HistogramDataPoint, NumberDataPoint
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import SpanKind

from tests.harness import Answer, AppUnderTest, running_app

T = TypeVar("T")
LIMIT_S = 10.0
LLM_CALLS = "llmops.llm.calls"
Counts = Mapping[frozenset[tuple[str, Any]], float]


def eventually(probe: Callable[[], T], what: str, limit_s: float = LIMIT_S) -> T:
    """Ask until the answer is true or the limit is reached; the answer."""
    end = time.monotonic() + limit_s
    while not (found := probe()):
        assert time.monotonic() < end, f"not within {limit_s} s: {what}"
        time.sleep(0.005)
    return found


@contextmanager
def module_app(app_setup: Any = None, **values: Any) -> Iterator[AppUnderTest]:
    """An app for all tests of a module, that leaves the process's logging as it was."""
    root = logging.getLogger()
    before = root.handlers[:], root.level
    with running_app(app_setup, **values) as app:
        yield app
    root.handlers[:] = before[0]
    root.setLevel(before[1])


@dataclass(frozen=True)
class TraceParent:
    """A caller's trace context."""

    header: str
    trace_id: str | None = None
    span_id: str | None = None

    @classmethod
    def new(cls, flags: str) -> "TraceParent":
        """One that nobody has used before."""
        trace_id, span_id = secrets.token_hex(16), secrets.token_hex(8)
        return cls(f"00-{trace_id}-{span_id}-{flags}", trace_id, span_id)


def trace_of(app: AppUnderTest, request_id: str) -> list[ReadableSpan]:
    """All spans of a request's trace, once its server span has ended and its last line is written.

    Both happen after the answer is out: whoever looks at once may be too early.
    """
    eventually(
        lambda: any(span.kind is SpanKind.SERVER for span in app.spans(request_id)),
        f"the server span of {request_id}",
    )
    if app.settings.log_level in {"DEBUG", "INFO"}:
        eventually(
            lambda: any(line["message"] == "http_request_completed" for line in app.lines(request_id)),
            f"the last line of {request_id}",
        )
    return app.spans(request_id)


def server_span(app: AppUnderTest, request_id: str) -> ReadableSpan:
    """The one server span of a trace."""
    (found,) = [span for span in trace_of(app, request_id) if span.kind is SpanKind.SERVER]
    return found


def completed_line(app: AppUnderTest, request_id: str) -> dict[str, Any]:
    """The one line that closes a request in the log."""
    trace_of(app, request_id)
    (line,) = [line for line in app.lines(request_id) if line["message"] == "http_request_completed"]
    return line


def value_of(app: AppUnderTest, name: str, attributes: dict[str, str]) -> float:
    """The value (of a histogram: the count) of the points with exactly these of the attributes named here."""
    return sum(
        _amount(point)
        for point in app.points(name)
        if attributes == {key: (point.attributes or {}).get(key) for key in attributes}
    )


def attribute_sets(app: AppUnderTest, name: str) -> Counts:
    """The value, or the count, of each point of a metric."""
    return {frozenset((point.attributes or {}).items()): _amount(point) for point in app.points(name)}


def _amount(point: NumberDataPoint | HistogramDataPoint) -> float:
    return point.value if isinstance(point, NumberDataPoint) else point.count


def assert_error_body(app: AppUnderTest, answer: Answer, name: str) -> None:
    """The body is the one error shape, with the ids of this request."""
    body = answer.json
    assert body["error"] == name
    assert body["request_id"] == answer.request_id
    assert body["incident_id"] == f"inc_{server_span(app, answer.request_id).context.span_id:016x}"
    assert isinstance(body["message"], str)
    assert body["message"]
    moment = time.strptime(body["timestamp"][:19], "%Y-%m-%dT%H:%M:%S")
    assert moment.tm_year >= 2026
    assert body["timestamp"][19] == "."
    assert body["timestamp"][20:23].isdigit()
    assert body["timestamp"][23:] == "Z"
    assert set(body) - {"details"} == {"error", "message", "incident_id", "request_id", "timestamp"}


@dataclass(frozen=True)
class RawAnswer:
    """Bytes off a socket: all of them, and whether the other side ended the connection in order."""

    data: bytes
    closed: bool

    @property
    def answer(self) -> Answer:
        """The one HTTP answer in it."""
        head, _, body = self.data.partition(b"\r\n\r\n")
        status, *fields = head.decode("latin-1").split("\r\n")
        pairs = (field.split(":", 1) for field in fields)
        headers = {name.strip().lower(): value.strip() for name, value in pairs}
        return Answer(int(status.split(" ")[1]), headers, body, 0.0)


def raw(port: int, *pieces: bytes, limit_s: float = 5.0) -> RawAnswer:
    """Send bytes as they are and read until the other side ends the connection or the limit is reached."""
    read = b""
    with socket.create_connection(("127.0.0.1", port), timeout=limit_s) as connection:
        with suppress(OSError):
            for piece in pieces:
                connection.sendall(piece)
        try:
            while data := connection.recv(65_536):
                read += data
        except TimeoutError:
            return RawAnswer(read, closed=False)
        except ConnectionResetError:
            return RawAnswer(read, closed=True)
    return RawAnswer(read, closed=True)


def http_request(method: str, path: bytes, headers: dict[str, bytes], body: bytes = b"") -> bytes:
    """An HTTP/1.1 request's bytes, on a connection that ends with it."""
    fields = {
        "Host": b"127.0.0.1",
        "Connection": b"close",
        **({"Content-Length": str(len(body)).encode(), "Content-Type": b"application/json"} if body else {}),
        **headers,
    }
    lines = [name.encode() + b": " + value for name, value in fields.items()]
    return b"\r\n".join([method.encode() + b" " + path + b" HTTP/1.1", *lines, b"", body])


def chunked(body: bytes, size: int = 512) -> bytes:
    """A body in chunked transfer coding."""
    pieces = [body[at : at + size] for at in range(0, len(body), size)]
    return b"".join(f"{len(piece):x}\r\n".encode() + piece + b"\r\n" for piece in [*pieces, b""])


def as_json(value: Any) -> bytes:
    """A JSON body."""
    return json.dumps(value).encode()


def assert_failed_once(
    app: AppUnderTest, request_id: str, error: str, before: Counts, *, model: str = "demo"
) -> None:
    """One failed model call: its spans, its count among what came after ``before``, its log lines."""
    outcome = "cancelled" if error == "cancelled" else "error"
    spans = trace_of(app, request_id)
    (use_case,) = [span for span in spans if span.name == "llm call"]
    (chat,) = [span for span in spans if "gen_ai.operation.name" in (span.attributes or {})]
    assert (chat.kind, chat.parent) == (SpanKind.CLIENT, use_case.context)
    metric_error = {} if outcome == "cancelled" else {"error.type": error}
    for span in (use_case, chat):
        assert not span.status.is_ok
    assert attributes(chat)["error.type"] == error
    assert attributes(use_case)["llmops.llm.outcome"] == outcome
    assert attributes(use_case).get("error.type") == metric_error.get("error.type")

    after = attribute_sets(app, LLM_CALLS)
    grown = {key: amount - before.get(key, 0) for key, amount in after.items()}
    changed = {key: amount for key, amount in grown.items() if amount}
    assert changed == {frozenset({"model": model, "outcome": outcome, **metric_error}.items()): 1}

    lines = [line for line in app.lines(request_id) if line["message"].startswith("llm_request")]
    assert [line["message"] for line in lines] == ["llm_request_started", "llm_request_failed"]
    for line in lines:
        assert line["user"] == "user"
        assert line["trace_id"] == request_id
    assert lines[1]["outcome"] == outcome
    assert lines[1].get("error") == metric_error.get("error.type")


def attributes(span: ReadableSpan) -> Mapping[str, Any]:
    """The span's attributes."""
    return span.attributes or {}
