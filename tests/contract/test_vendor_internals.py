"""What this service relies on beyond the public interfaces of its libraries.

Each test fails when a library changes such a thing, and says where the service has to follow.
"""

import asyncio
import inspect
import logging
import re
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import aiohttp
import httpx2
import openai
import pytest
import uvicorn
from fastapi import FastAPI
from opentelemetry.exporter.otlp.proto.common._log_encoder import encode_logs
from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
from opentelemetry.instrumentation.logging import handler as otel_logging_handler
from opentelemetry.metrics import Counter, Histogram, NoOpMeter, UpDownCounter
from opentelemetry.metrics import NoOpMeterProvider as MeterProvider
from opentelemetry.sdk._logs import (
    LoggerProvider,
    LogRecordProcessor,
    ReadableLogRecord,
    ReadWriteLogRecord,
)
from opentelemetry.sdk._logs.export import BatchLogRecordProcessor, InMemoryLogRecordExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.util.re import parse_env_headers
from purgatory.domain.model import Context
from qdrant_client import QdrantClient, models
from qdrant_client.local.qdrant_local import QdrantLocal
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.supervisors import Multiprocess
from uvicorn.supervisors.multiprocess import Process

from service.cache.embedded import set_pragmas
from service.config.log_records import Bridge, PlainRecord
from service.config.logging import BRIDGE_LOGGER, HEADER_PARSER
from service.upstream.sdk import PreparedOpenAI
from service.upstream.transport import FIELDS, UpstreamClient


def test_qdrant_local_storage(tmp_path: Path) -> None:
    see = "see set_pragmas in service/cache/embedded.py"
    client = QdrantClient(path=str(tmp_path))
    client.create_collection("answers", vectors_config={})
    local = getattr(client, "_client", None)
    if not isinstance(local, QdrantLocal):
        pytest.fail(f"qdrant_client changed where it keeps its local client; {see}")
    try:
        storage = local.collections["answers"].storage
        assert storage is not None
        connection = storage.storage
    except (AttributeError, AssertionError):
        pytest.fail(f"qdrant_client changed where a collection keeps its SQLite connection; {see}")
    assert isinstance(connection, sqlite3.Connection), f"qdrant_client changed its storage; {see}"
    set_pragmas(local)
    assert connection.execute("PRAGMA synchronous").fetchone() == (1,), (
        f"qdrant_client changed the connection that commits; {see}"
    )

    see = "see EmbeddedStore.delete in service/cache/embedded.py"
    ids = ["00000000-0000-0000-0000-000000000001"]
    client.upsert("answers", [models.PointStruct(id=ids[0], payload={"body": "secret"}, vector={})])
    client.overwrite_payload("answers", payload={}, points=list(ids))
    client.delete("answers", models.PointIdsList(points=list(ids)))
    assert local.collections["answers"].payload == [{}], (
        f"qdrant_client changed what it keeps of a deleted point; {see}"
    )
    client.close()


SEE_MLFLOW = "see service/recording/mlflow.py"


def test_mlflow() -> None:
    from mlflow.exceptions import MlflowException, RestException  # noqa: PLC0415 - takes most of a second
    from mlflow.tracing.constant import SpanAttributeKey  # noqa: PLC0415 - as above
    from mlflow.tracing.utils import otlp  # noqa: PLC0415 - as above
    from mlflow.utils.credentials import get_default_host_creds  # noqa: PLC0415 - as above
    from mlflow.utils.rest_utils import http_request  # noqa: PLC0415 - as above

    from service.recording import mlflow  # noqa: PLC0415 - as above

    taken = set(inspect.signature(http_request).parameters)
    used = {"host_creds", "endpoint", "method", "extra_headers", "max_retries", "timeout", "raise_on_status"}
    assert used | {"kwargs"} <= taken, f"mlflow changed http_request's parameters; {SEE_MLFLOW}"

    def failure(url: str, timeout_s: float) -> BaseException:
        # The SDK's functions have no types.
        host = get_default_host_creds(url)  # type: ignore[no-untyped-call]
        with pytest.raises(MlflowException) as raised:
            http_request(host, "/", "GET", max_retries=0, timeout=timeout_s)  # type: ignore[no-untyped-call]
        return raised.value

    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert mlflow.is_timeout(failure(url, 0.2)), f"mlflow changed how it raises a timeout; {SEE_MLFLOW}"
    assert not mlflow.is_timeout(failure(url, 5)), f"mlflow changed how it raises a refusal; {SEE_MLFLOW}"

    answer = {"error_code": "INVALID_PARAMETER_VALUE", "message": ""}
    code = RestException(answer).error_code  # type: ignore[no-untyped-call]
    assert code in mlflow.ERRORS_BY_CODE, f"mlflow changed RestException.error_code; {SEE_MLFLOW}"

    ours = (mlflow.SPAN_TYPE, mlflow.INPUTS, mlflow.OUTPUTS, mlflow.COST, mlflow.TAG)
    theirs = (
        SpanAttributeKey.SPAN_TYPE,
        SpanAttributeKey.INPUTS,
        SpanAttributeKey.OUTPUTS,
        SpanAttributeKey.LLM_COST,
        SpanAttributeKey.TRACE_TAG_PREFIX,
    )
    assert ours == theirs, f"mlflow changed the names of span attributes; {SEE_MLFLOW}"
    headers = (otlp.MLFLOW_EXPERIMENT_ID_HEADER, otlp.MLFLOW_RUN_ID_HEADER)
    assert headers == (mlflow.EXPERIMENT_HEADER, mlflow.RUN_HEADER), f"mlflow changed headers; {SEE_MLFLOW}"


SEE_DEFERRED = "see service/utils/deferred_packages.py, and who calls it"
UNUSED = {
    "mlflow": ("mlflow.genai", "mlflow.models.model", "mlflow.tracking.fluent", "mlflow.tracking.client"),
    "openai": ("openai.types.responses.response",),
    "qdrant_client": ("qdrant_client.qdrant_remote", "qdrant_client.http.api_client"),
    "sqlalchemy": ("sqlalchemy.dialects.postgresql",),
}
"""Modules that a process with everything on does not load."""


def test_modules_that_are_not_used_are_not_loaded(tmp_path: Path) -> None:
    program = """
import sys
import service.server, service.cache.embedded
from service.recording import mlflow
mlflow._import_sdk()
from openai import AsyncOpenAI
from qdrant_client.http import models
AsyncOpenAI(api_key="none").chat.completions
models.PointStruct(id=1, payload={}, vector={})
print(*sys.modules)
"""
    path = str(Path(__file__).parents[2])
    ran = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={"PATH": "", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    loaded = set(ran.stdout.split())
    assert loaded, ran.stderr
    for library, unused in UNUSED.items():
        assert loaded.isdisjoint(unused), f"{library} imports more than it did; {SEE_DEFERRED}"


HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
TRANSPORT = "see service/upstream/transport.py"


def test_aiohttp_connections() -> None:
    see = f"{TRANSPORT}, _Connector and _ConnectionMonitor"

    async def main() -> None:
        async with _Server() as server, aiohttp.ClientSession(connector=_Recording()) as session:
            answer = await session.get(server.url)
            connector = session.connector
            assert isinstance(connector, _Recording)
            assert len(connector.protocols) == 1, f"aiohttp changed BaseConnector.connect; {see}"
            protocol: Any = connector.protocols[0]
            assert protocol is not None, f"aiohttp changed Connection.protocol; {see}"
            offered: Any = None if answer.connection is None else answer.connection.protocol
            assert offered is protocol, f"aiohttp changed ClientResponse.connection; {see}"
            assert isinstance(protocol.closed, asyncio.Future), f"aiohttp changed protocol.closed; {see}"
            await server.send(b"0\r\n\r\n")
            await answer.read()
            assert protocol.should_close is False, f"aiohttp changed protocol.should_close; {see}"
            await server.send(HEAD + b"0\r\n\r\n")
            await _until(lambda: protocol.should_close, f"aiohttp changed protocol.should_close; {see}")
            answer = await session.get(server.url)
            assert answer.status == 200
            assert connector.protocols[1] is protocol, (
                f"aiohttp changed the reuse of connections: it checks for unrequested bytes itself; {see}"
            )
            answer.close()

    asyncio.run(main())


def test_aiohttp_reads() -> None:
    see = f"{TRANSPORT}, _ConnectionMonitor"

    async def main() -> None:
        async with _Server() as server, aiohttp.ClientSession(connector=_Recording()) as session:
            answer = await session.get(server.url)
            connector = session.connector
            assert isinstance(connector, _Recording)
            protocol = connector.protocols[0]
            assert protocol is not None
            closed = protocol.closed
            assert closed is not None
            reading = asyncio.create_task(answer.content.readany())
            await server.send(b"no chunk\r\n")
            await _until(closed.done, f"aiohttp changed what it does after invalid framing; {see}")
            await asyncio.sleep(0)
            assert not reading.done(), (
                f"aiohttp changed reads after invalid framing: they fail by themselves now; {see}"
            )
            assert closed.exception() is None, f"aiohttp changed protocol.closed; {see}"
            answer.content.set_exception(aiohttp.ClientPayloadError())
            with pytest.raises(aiohttp.ClientPayloadError):
                await reading
            answer.close()

    asyncio.run(main())


def test_openai_requests() -> None:
    see = "service/upstream/sdk.py"
    seen: dict[str, str] = {}

    def answer(request: httpx2.Request) -> httpx2.Response:
        seen.update(request.extensions[FIELDS])
        return httpx2.Response(400, json={"error": {"message": "No.", "code": "no"}})

    async def main() -> None:
        http = UpstreamClient(httpx2.MockTransport(answer))
        async with PreparedOpenAI("key", "http://upstream/v1", http) as sdk:
            with pytest.raises(openai.BadRequestError) as refused:
                await sdk.exchange("POST", "http://upstream/v1/x", httpx2.Timeout(3.0), content=b"{}")
            assert refused.value.body == {"message": "No.", "code": "no"}, (
                f"openai changed what it makes of an error; {see}, _make_status_error_from_response"
            )

    asyncio.run(main())
    assert seen == {
        "authorization": "Bearer key",
        "accept": "application/json",
        "accept-encoding": "identity",
        "content-type": "application/json",
        "user-agent": f"AsyncOpenAI/Python {openai.__version__}",
    }, f"openai changed the header fields that it sends; {see}, ABOUT_ITSELF"


class _Recording(aiohttp.TCPConnector):
    """Keeps the protocols of the connections that it gives out."""

    def __init__(self) -> None:
        super().__init__()
        self.protocols: list[Any] = []

    async def connect(self, req: Any, traces: Any, timeout: Any) -> Any:  # noqa: ASYNC109 - as the base class
        connection = await super().connect(req, traces, timeout)
        self.protocols.append(getattr(connection, "protocol", None))
        return connection


class _Server:
    """Answers each request with a head, and sends what it is told to."""

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._answer, "127.0.0.1", 0)
        self._tasks: list[asyncio.Task[Any] | None] = []
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_exception: object) -> None:
        self._server.close()
        async with asyncio.timeout(5):
            await asyncio.gather(*(task for task in self._tasks if task is not None))

    async def send(self, data: bytes) -> None:
        """Send bytes on the only connection."""
        self._writer.write(data)
        await self._writer.drain()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._tasks.append(asyncio.current_task())
        self._writer = writer
        while await reader.readline():
            while (await reader.readline()) not in {b"\r\n", b""}:
                pass
            writer.write(HEAD)
        writer.close()


async def _until(condition: Callable[[], bool], otherwise: str) -> None:
    try:
        async with asyncio.timeout(5):
            while not condition():  # noqa: ASYNC110 - nothing announces it
                await asyncio.sleep(0.01)
    except TimeoutError:
        pytest.fail(otherwise)


def _changed(library: str, what: str, where: str) -> str:
    return f"{library} changed {what}; see {where}"


def _config() -> uvicorn.Config:
    return uvicorn.Config(FastAPI(), port=0, http=HttpToolsProtocol, lifespan="off", log_config=None)


def test_uvicorn_protocol() -> None:
    """``service.protocol`` overrides these methods and reads these attributes."""

    async def attributes() -> set[str]:
        config = _config()
        config.load()
        server = uvicorn.Server(config)
        return set(vars(HttpToolsProtocol(config, server.server_state, {})))

    read = {"loop", "transport", "cycle", "tasks", "app", "app_state", "server_state"}
    scope = {"server", "client", "scheme", "asgi_version", "root_path"}
    overridden = {
        *("connection_made", "connection_lost", "data_received", "on_message_begin"),
        *("on_headers_complete", "on_response_complete", "send_400_response"),
    }
    missing = (read | scope) - asyncio.run(attributes()) | overridden - set(vars(HttpToolsProtocol))
    assert not missing, _changed("uvicorn", f"HttpToolsProtocol ({missing})", "service/protocol.py")
    assert STATUS_LINE[400].startswith(b"HTTP/1.1 400 "), _changed(
        "uvicorn", "STATUS_LINE", "service/protocol.py"
    )


def test_uvicorn_request_cycle() -> None:
    """``service.protocol`` reads these attributes of an answer in progress, and sets some of them."""
    source = inspect.getsource(RequestResponseCycle.__init__)
    used = (
        "chunked_encoding",
        "disconnected",
        "expected_content_length",
        "keep_alive",
        "message_event",
        "more_body",
        "response_started",
        "response_complete",
    )
    missing = [name for name in used if not re.search(rf"self\.{name}(: [^=]+)? = ", source)]
    assert not missing, _changed("uvicorn", f"RequestResponseCycle ({missing})", "service/protocol.py")


def test_uvicorn_invalid_http_is_answered_by_an_overridable_method() -> None:
    """A parser error must end in ``send_400_response``, where ``service.protocol`` answers it."""
    answered: list[str] = []

    class Protocol(HttpToolsProtocol):
        def send_400_response(self, msg: str) -> None:
            answered.append(msg)

    async def main() -> None:
        config = _config()
        config.load()
        Protocol(config, uvicorn.Server(config).server_state, {}).data_received(b"\x00\r\n\r\n")

    asyncio.run(main())
    assert len(answered) == 1, _changed("uvicorn", "its answer to invalid HTTP", "service/protocol.py")


def test_uvicorn_server_startup() -> None:
    """``service.server`` adds listeners to ``servers``, with protocols made as ``startup`` makes them."""

    async def main() -> set[str]:
        server = uvicorn.Server(_config())
        server.config.load()
        server.lifespan = server.config.lifespan_class(server.config)
        await server.startup()
        try:
            protocol = server.config.http_protocol_class(  # type: ignore[call-arg]  # typed as asyncio.Protocol
                config=server.config, server_state=server.server_state, app_state=server.lifespan.state
            )
            assert isinstance(protocol, HttpToolsProtocol)
            assert len(server.servers) == 1
            assert server.servers[0].sockets
            assert server.started
            return {name for name in ("default_headers", "tasks") if hasattr(server.server_state, name)}
        finally:
            await server.shutdown()

    try:
        found = asyncio.run(main())
    except (AssertionError, AttributeError, TypeError) as error:
        pytest.fail(_changed("uvicorn", f"Server.startup ({error!r})", "service/server.py"))
    assert found == {"default_headers", "tasks"}, _changed("uvicorn", "ServerState", "service/protocol.py")


def test_uvicorn_signal_handlers() -> None:
    """``services.drain`` finds the server behind its signal handler, and reads and sets its flags."""
    server = uvicorn.Server(_config())
    original = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with server.capture_signals():
            handler = signal.getsignal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, original)
    message = _changed("uvicorn", "its signal handlers", "service/services/drain.py")
    assert inspect.ismethod(handler), message
    assert handler.__self__ is server, message
    assert (server.should_exit, server.force_exit) == (False, False), message
    handler(signal.SIGTERM, None)
    assert server.should_exit, message
    handler(signal.SIGINT, None)
    assert server.force_exit, message


def test_uvicorn_parent_process() -> None:
    """``service.server`` waits for the workers itself, and passes stop signals on to them meanwhile."""
    message = _changed("uvicorn", "Multiprocess", "service/server.py")
    run = inspect.getsource(Multiprocess.run)
    assert "self.terminate_all()\n        self.join_all()" in run, message
    assert "self.processes" in inspect.getsource(Multiprocess.join_all), message
    handlers = inspect.getsource(Multiprocess.__init__)
    assert "signal.signal(sig, lambda sig, frame: self.signal_queue.append(sig))" in handlers, message
    assert {"handle_hup", "handle_term"} <= set(vars(Multiprocess)), message
    assert {"exitcode", "terminate"} <= set(vars(Process)), message


def test_purgatory_state_model() -> None:
    """``services.circuit_breaker`` drives the model, with a TTL that lets it leave ``opened`` at once."""
    message = _changed("purgatory", "its state model", "service/services/circuit_breaker.py")
    model = Context("test", 2, ttl=float("-inf"))
    states = [model.state]
    changes: list[Callable[[], None]] = [
        lambda: model.handle_exception(ValueError()),
        lambda: model.handle_exception(ValueError()),
        model.handle_new_request,
        lambda: model.handle_exception(ValueError()),
        model.handle_new_request,
        model.handle_end_request,
    ]
    for change in changes:
        change()
        states.append(model.state)
    assert states == [
        *("closed", "closed", "opened", "half-opened", "opened", "half-opened", "closed"),
    ], message
    assert isinstance(model.messages, list), message
    assert model.threshold == 2, message


class _RecordingMeter(NoOpMeter):
    """Records the instruments that are created."""

    def __init__(self, created: set[tuple[str, str]]) -> None:
        super().__init__("test")
        self._created = created

    def create_counter(self, name: str, unit: str = "", description: str = "") -> Counter:
        self._created.add(("counter", name))
        return super().create_counter(name, unit, description)

    def create_up_down_counter(self, name: str, unit: str = "", description: str = "") -> UpDownCounter:
        self._created.add(("up_down_counter", name))
        return super().create_up_down_counter(name, unit, description)

    def create_histogram(
        self, name: str, unit: str = "", description: str = "", **_options: object
    ) -> Histogram:
        self._created.add(("histogram", name))
        return super().create_histogram(name, unit, description)


class _RecordingProvider(MeterProvider):
    def __init__(self) -> None:
        self.created: set[tuple[str, str]] = set()

    def get_meter(self, *_args: object, **_kwargs: object) -> _RecordingMeter:
        return _RecordingMeter(self.created)


def test_opentelemetry_sdk_tracer_metrics() -> None:
    """``telemetry.providers`` provides the counter and suppresses the up-down counter."""
    provider = _RecordingProvider()
    TracerProvider(meter_provider=provider, shutdown_on_exit=False).get_tracer("test").start_span("x").end()
    assert provider.created == {
        ("counter", "otel.sdk.span.started"),
        ("up_down_counter", "otel.sdk.span.live"),
    }, _changed("opentelemetry-sdk", "the metrics of its tracer", "service/telemetry/providers.py")


def test_opentelemetry_asgi_instruments() -> None:
    """``telemetry.server`` provides the histograms and the up-down counter, and wraps the duration."""
    provider = _RecordingProvider()
    OpenTelemetryMiddleware(FastAPI(), meter=provider.get_meter())
    assert provider.created == {
        ("histogram", "http.server.request.duration"),
        ("histogram", "http.server.request.body.size"),
        ("histogram", "http.server.response.body.size"),
        ("up_down_counter", "http.server.active_requests"),
    }, _changed("opentelemetry-instrumentation-asgi", "its instruments", "service/telemetry/server.py")


def test_opentelemetry_logging_handlers_own_logger() -> None:
    """``config.logging`` replaces the handlers of this logger, which writes plain text to stderr."""
    found = otel_logging_handler._internal_logger.name  # noqa: SLF001 - its name is what is checked
    assert found == BRIDGE_LOGGER, _changed(
        "opentelemetry-instrumentation-logging", "its own logger", "service/config/logging.py"
    )


def _exported(handler: Callable[[LoggerProvider], logging.Handler], record: logging.LogRecord) -> Any:
    """The log record that a handler and the batch processor make of a record, and what was queued."""
    exporter = InMemoryLogRecordExporter()  # type: ignore[no-untyped-call]  # untyped in the SDK
    provider = LoggerProvider(shutdown_on_exit=False)
    provider.add_log_record_processor(BatchLogRecordProcessor(exporter))
    emitted: list[ReadWriteLogRecord] = []
    emit = handler(provider)
    provider.add_log_record_processor(_Keeping(emitted))
    emit.handle(record)
    provider.force_flush()
    (found,) = exporter.get_finished_logs()
    provider.shutdown()
    return found, emitted[0]


def test_opentelemetry_log_records() -> None:
    """``config.log_records`` makes records as the library's handler and the SDK do, without their copies."""
    where = "service/config/log_records.py: Bridge.emit, _ExportedRecord and _PlainLogRecord"
    fields = {"text": "t", "number": 1, "share": 0.5, "flag": True, "nothing": None}
    plain = PlainRecord("a.logger", logging.WARNING, "it_happened", dict(fields))
    usual = logging.makeLogRecord({**vars(plain), "msg": "it_happened"})
    ours, our_emitted = _exported(Bridge, plain)
    theirs, their_emitted = _exported(
        lambda provider: otel_logging_handler.LoggingHandler(logger_provider=provider), usual
    )
    assert vars(our_emitted).keys() == vars(their_emitted).keys(), _changed(
        "opentelemetry-sdk", "the attributes of ReadWriteLogRecord", where
    )
    assert vars(ours.log_record).keys() == vars(theirs.log_record).keys(), _changed(
        "opentelemetry-api", "the attributes of LogRecord", where
    )
    assert ours.log_record is our_emitted.log_record, _changed(
        "opentelemetry-sdk", "how BatchLogRecordProcessor copies records", where
    )
    for record in (ours, theirs):
        record.log_record.observed_timestamp = 0
    assert _encoded(ours) == _encoded(theirs), _changed(
        "opentelemetry-instrumentation-logging or the SDK", "what it makes of a record", where
    )


def _encoded(record: ReadableLogRecord) -> str:
    (of_resource,) = encode_logs([record]).resource_logs
    return str(of_resource.scope_logs)


class _Keeping(LogRecordProcessor):
    """Keeps the records that it gets."""

    def __init__(self, records: list[ReadWriteLogRecord]) -> None:
        self._records = records

    def on_emit(self, log_record: ReadWriteLogRecord) -> None:
        self._records.append(log_record)

    def shutdown(self) -> None: ...

    def force_flush(self, timeout_millis: int = 0) -> bool:  # noqa: ARG002 - the SDK's interface
        return True


def test_opentelemetry_header_parser(caplog: pytest.LogCaptureFixture) -> None:
    """``config.logging`` replaces the message of this logger, which quotes credentials."""
    with caplog.at_level(logging.DEBUG):
        parse_env_headers("Authorization: Bearer canary")
    quoting = {record.name for record in caplog.records if "canary" in record.getMessage()}
    assert quoting == {HEADER_PARSER}, _changed(
        "opentelemetry-api", "the parser of header variables", "service/config/logging.py"
    )
