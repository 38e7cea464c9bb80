"""Runs the app under uvicorn: ``serve`` is the command, ``build`` makes the app in each worker process.

This module and ``protocol`` are the only ones that use uvicorn's internals, apart from the flags that
``services.drain`` reads; ``tests/contract/test_vendor_internals.py`` checks what they rely on.
"""

import asyncio
import gc
import logging
import os
import signal
import socket
from collections.abc import Iterator
from types import FrameType
from typing import Any, cast

import uvicorn
from fastapi import FastAPI
from opentelemetry import metrics, trace
from uvicorn.supervisors import Multiprocess

from service.app import create_app
from service.config.env_validator import read_settings
from service.config.logging import configure_logging
from service.config.settings import Settings, prepare_environment
from service.telemetry.providers import Telemetry, build_telemetry

GC_THRESHOLDS = (20_000, 20, 50)
"""Thresholds of Python's cycle collector (its defaults are 700, 10 and 10). Together with ``gc.freeze`` they
save a fifth of a request's processor time."""

LISTENERS_PER_SOCKET = 32
"""Duplicates of a listening socket that are registered with the event loop. uvloop accepts one connection per
descriptor and iteration; with 60 requests in flight an iteration takes 30 ms, so that the last of 60 clients
that connect at the same time would wait for two seconds."""

STARTUP_FAILURE = 3
"""uvicorn's exit status when the app does not start."""

logger = logging.getLogger(__name__)


class TelemetryVariablesError(Exception):
    """The SDK refused a value of the ``OTEL_*`` variables that it reads itself."""


def serve(settings: Settings) -> int:
    """Serve until a stop signal and return the process's exit status.

    uvicorn raises the stop signal again after it has stopped. The handlers set here turn that into exit
    status 0, because a completed shutdown is a success for an orchestrator.
    """
    configure_logging(settings.log_level)
    signal.signal(signal.SIGTERM, _exit_zero)
    signal.signal(signal.SIGINT, _exit_zero)
    config = uvicorn.Config(
        "service.server:build",
        factory=True,
        host=settings.host,
        port=settings.port,
        workers=settings.workers,
        http="service.protocol:Protocol",
        ws="none",
        lifespan="on",
        # Logging is configured already; uvicorn's access log would contain the query string.
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=bool(settings.forwarded_allow_ips),
        forwarded_allow_ips=settings.forwarded_allow_ips,
        # Requests have been drained by then; only idle connections are left.
        timeout_graceful_shutdown=1,
        # Without it a request would inherit the context variables of the lifespan.
        reset_contextvars=True,
    )
    if settings.workers > 1:
        Multiprocess(config, sockets=list(_duplicates(config.bind_socket()))).run()
        return 0
    config.load_app()
    server = _Server(config)
    server.run()
    return 0 if server.started else STARTUP_FAILURE


def build() -> FastAPI:
    """Build the app from the environment; uvicorn calls this once in each worker process.

    Raises:
        SystemExit: The configuration has become invalid since the parent process validated it.
    """
    settings = read_settings().settings
    if settings is None:
        raise SystemExit(1)
    prepare_environment(settings)
    try:
        telemetry = load_telemetry(settings)
    except TelemetryVariablesError as error:
        logger.error("Error: %s", error)  # noqa: TRY400 - a problem of the configuration, not a bug
        raise SystemExit(1) from None
    configure_logging(settings.log_level, telemetry.logger_provider)
    # For libraries that use the global providers.
    trace.set_tracer_provider(telemetry.tracer_provider)
    metrics.set_meter_provider(telemetry.meter_provider)
    app = create_app(settings, telemetry)
    # Objects that exist now live until the process ends, and a request leaves hardly any cycles behind.
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    return app


def load_telemetry(settings: Settings) -> Telemetry:
    """Build the telemetry providers.

    Raises:
        TelemetryVariablesError: The SDK refused one of the ``OTEL_*`` variables.
    """
    try:
        return build_telemetry(settings)
    except Exception as error:
        # The SDK raises a different exception for each variable.
        raise TelemetryVariablesError(
            f"The OTEL_* variables are not valid: {type(error).__name__}: {str(error)[:200]}"
        ) from error


class _Server(uvicorn.Server):
    """uvicorn's server, listening on several duplicates of each of its sockets."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start as uvicorn does, then add the duplicates."""
        await super().startup(sockets)
        loop = asyncio.get_running_loop()

        def make_protocol() -> asyncio.Protocol:
            # uvicorn types the class as asyncio.Protocol, whose constructor takes no arguments.
            protocol_class = cast("Any", self.config.http_protocol_class)
            protocol: asyncio.Protocol = protocol_class(
                config=self.config, server_state=self.server_state, app_state=self.lifespan.state
            )
            return protocol

        for server in list(self.servers):
            for listener in server.sockets:
                for duplicate in list(_duplicates(listener))[1:]:
                    self.servers.append(
                        await loop.create_server(make_protocol, sock=duplicate, backlog=self.config.backlog)
                    )


def _duplicates(listener: socket.socket) -> Iterator[socket.socket]:
    """Yield the listening socket itself, then its duplicates."""
    yield listener
    for _ in range(LISTENERS_PER_SOCKET - 1):
        yield socket.socket(fileno=os.dup(listener.fileno()))


def _exit_zero(_signal: int, _frame: FrameType | None) -> None:
    # Without it the interpreter's last collection would traverse the SDKs' objects for half a second.
    gc.freeze()
    raise SystemExit(0)
