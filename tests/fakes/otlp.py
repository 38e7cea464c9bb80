"""A real OTLP receiver for traces, metrics and logs, over HTTP with protobuf and over gRPC."""

from __future__ import annotations

import gzip
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any, Self

import grpc  # type: ignore[import-untyped]

from tests.fakes.http_server import EndingHttpServer
from tests.fakes.otlp_records import Log, Point, Span, SpanEvent, SpanLink, logs_in, points_in, spans_in
from tests.fakes.waiting import Watched

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["Log", "OtlpReceiver", "Point", "Span", "SpanEvent", "SpanLink"]

_SERVICES = {
    "traces": "opentelemetry.proto.collector.trace.v1.TraceService",
    "metrics": "opentelemetry.proto.collector.metrics.v1.MetricsService",
    "logs": "opentelemetry.proto.collector.logs.v1.LogsService",
}
_DECODERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    "identity": bytes,
    "gzip": gzip.decompress,
    "deflate": zlib.decompress,
}
# In protobuf every export response without a partial success is an empty message.
_SUCCESS = b""


class OtlpReceiver(Watched):
    """A collector that keeps what it has acknowledged, as flat records."""

    def __init__(self) -> None:
        super().__init__()
        self.answer_status = 200
        self.hang = False
        self._spans: list[Span] = []
        self._logs: list[Log] = []
        self._points: list[Point] = []
        self._raw: list[bytes] = []
        self._exports = 0

    def __enter__(self) -> Self:
        self._http = _HttpServer(self)
        self._http_thread = threading.Thread(target=self._http.serve_forever, name="otlp-http", args=(0.01,))
        self._http_thread.start()
        self._grpc_pool = ThreadPoolExecutor(max_workers=8, thread_name_prefix="otlp-grpc")
        self._grpc = _grpc_server(self, self._grpc_pool)
        self._grpc_port: int = self._grpc.add_insecure_port("127.0.0.1:0")
        self._grpc.start()
        return self

    def __exit__(self, *_exc_info: object) -> None:
        self._grpc.stop(grace=None).wait()
        self._grpc_pool.shutdown()
        self._http.shutdown()
        self._http_thread.join()
        self._http.drop_connections()
        self._http.server_close()

    def __repr__(self) -> str:
        with self._changed:
            spans = [span.name for span in self._spans]
            points = sorted({point.name for point in self._points})
            return f"<OtlpReceiver exports={self._exports} {spans=} logs={len(self._logs)} {points=}>"

    @property
    def http_url(self) -> str:
        """The base URL for OTLP/HTTP, without /v1/..."""
        return f"http://127.0.0.1:{self._http.server_port}"

    @property
    def grpc_url(self) -> str:
        """The endpoint for OTLP/gRPC, without TLS."""
        return f"http://127.0.0.1:{self._grpc_port}"

    @property
    def exports(self) -> int:
        """The number of export calls that arrived, whether acknowledged or not."""
        with self._changed:
            return self._exports

    @property
    def raw(self) -> list[bytes]:
        """The decompressed payloads received, for finding a string wherever it may hide."""
        with self._changed:
            return list(self._raw)

    def spans(self, trace_id: str | None = None, name: str | None = None) -> list[Span]:
        """Return the spans received, of one trace or one name if asked."""
        with self._changed:
            return [
                span
                for span in self._spans
                if trace_id in {None, span.trace_id} and name in {None, span.name}
            ]

    def logs(self, trace_id: str | None = None) -> list[Log]:
        """Return the log records received, of one trace if asked."""
        with self._changed:
            return [log for log in self._logs if trace_id in {None, log.trace_id}]

    def points(self, name: str | None = None, **attributes: Any) -> list[Point]:
        """Return every data point received that has at least these attributes, oldest first."""
        return self._points_with(name, attributes)

    def _points_with(self, name: str | None, attributes: Mapping[str, Any]) -> list[Point]:
        with self._changed:
            return [
                point
                for point in self._points
                if name in {None, point.name} and attributes.items() <= point.attributes.items()
            ]

    def latest(self, name: str, attributes: Mapping[str, Any] | None = None) -> list[Point]:
        """Return the newest point of each attribute set that has at least these attributes."""
        newest: dict[str, Point] = {}
        for point in self._points_with(name, attributes or {}):
            key = repr(sorted(point.attributes.items()))
            if key not in newest or newest[key].time_ns <= point.time_ns:
                newest[key] = point
        return list(newest.values())

    def value(self, name: str, attributes: Mapping[str, Any] | None = None) -> float | None:
        """Return the newest value of the one attribute set meant; an exact match goes before a wider one."""
        candidates = self.latest(name, attributes)
        exact = [point for point in candidates if point.attributes == dict(attributes or {})]
        chosen = exact or candidates
        if len(chosen) > 1:
            sets = [point.attributes for point in chosen]
            raise LookupError(f"{attributes} fits {len(sets)} attribute sets of {name}: {sets}")
        return chosen[0].value if chosen else None

    def wait_for(self, predicate: Callable[[Self], bool], timeout_s: float = 10.0) -> None:
        """Block until the predicate holds for this receiver; raise TimeoutError when it never does."""
        super().wait_for(predicate, timeout_s)

    def clear(self) -> None:
        """Forget everything received; the modes stay."""
        with self._changed:
            for records in (self._spans, self._logs, self._points, self._raw):
                records.clear()
            self._exports = 0

    def arrived(self) -> None:
        """Count an export call."""
        with self._changed:
            self._exports += 1
            self._changed.notify_all()

    def store(self, signal: str, payload: bytes) -> None:
        """Keep what is in an export request about to be acknowledged."""
        spans = spans_in(payload) if signal == "traces" else []
        logs = logs_in(payload) if signal == "logs" else []
        points = points_in(payload) if signal == "metrics" else []
        with self._changed:
            self._spans += spans
            self._logs += logs
            self._points += points
            self._raw.append(payload)
            self._changed.notify_all()


class _HttpServer(EndingHttpServer):
    """The HTTP part."""

    def __init__(self, receiver: OtlpReceiver) -> None:
        self.receiver = receiver
        super().__init__(0, _HttpHandler)


class _HttpHandler(BaseHTTPRequestHandler):
    """One connection to the HTTP part."""

    server: _HttpServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        """Take an export request."""
        signal = self.path.removeprefix("/v1/")
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if signal not in _SERVICES:
            self._answer(404)
            return
        receiver = self.server.receiver
        receiver.arrived()
        if receiver.hang:
            # Nothing more is to come, so this ends when the client or the receiver ends the connection.
            self.rfile.read(1)
            self.close_connection = True
            return
        if receiver.answer_status == 200:
            receiver.store(signal, _DECODERS[self.headers.get("Content-Encoding", "")](body))
        self._answer(receiver.answer_status)

    def _answer(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/x-protobuf")
        self.send_header("Content-Length", str(len(_SUCCESS)))
        self.end_headers()
        self.wfile.write(_SUCCESS)

    def log_message(self, *_args: object, **_kwargs: object) -> None:
        """Keep the test's output clean."""


def _grpc_server(receiver: OtlpReceiver, pool: ThreadPoolExecutor) -> Any:
    # Port sharing would let two receivers of a parallel run take each other's exports.
    options = [("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", -1)]
    server = grpc.server(pool, options=options)
    server.add_generic_rpc_handlers(
        tuple(
            grpc.method_handlers_generic_handler(service, {"Export": _export_handler(receiver, signal)})
            for signal, service in _SERVICES.items()
        )
    )
    return server


def _export_handler(receiver: OtlpReceiver, signal: str) -> Any:
    def export(payload: bytes, context: Any) -> bytes:
        receiver.arrived()
        if receiver.hang:
            over = threading.Event()
            if context.add_callback(over.set):
                over.wait()
        else:
            receiver.store(signal, payload)
        return _SUCCESS

    # Without serializers the handler gets and returns the bytes on the wire.
    return grpc.unary_unary_rpc_method_handler(export)
