"""What the service relies on in libraries beyond their documentation, one test for each library and fact.

A failing test names the module to look at after an upgrade.
"""

import asyncio
import inspect
import logging
import signal
from typing import TYPE_CHECKING

import pytest
import uvicorn
from fastapi import FastAPI
from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
from opentelemetry.instrumentation.logging import handler as otel_logging_handler
from opentelemetry.metrics import Counter, Histogram, NoOpMeter, UpDownCounter
from opentelemetry.metrics import NoOpMeterProvider as MeterProvider
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.util.re import parse_env_headers
from purgatory.domain.model import Context
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from service.config.logging import BRIDGE_LOGGER, HEADER_PARSER

if TYPE_CHECKING:
    from collections.abc import Callable


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
    """``service.protocol`` reads these attributes of an answer in progress, and sets two of them."""
    source = inspect.getsource(RequestResponseCycle.__init__)
    used = (
        "disconnected",
        "keep_alive",
        "message_event",
        "more_body",
        "response_started",
        "response_complete",
    )
    missing = [name for name in used if f"self.{name} = " not in source]
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


def test_opentelemetry_header_parser(caplog: pytest.LogCaptureFixture) -> None:
    """``config.logging`` replaces the message of this logger, which quotes credentials."""
    with caplog.at_level(logging.DEBUG):
        parse_env_headers("Authorization: Bearer canary")
    quoting = {record.name for record in caplog.records if "canary" in record.getMessage()}
    assert quoting == {HEADER_PARSER}, _changed(
        "opentelemetry-api", "the parser of header variables", "service/config/logging.py"
    )
