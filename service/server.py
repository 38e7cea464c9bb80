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
import threading
from collections.abc import Iterator
from contextvars import Context
from functools import partial
from types import FrameType
from typing import Any, cast

import uvicorn
from fastapi import FastAPI
from opentelemetry import metrics, trace
from uvicorn.supervisors import Multiprocess

from service.app import create_app
from service.config.env_validator import read_settings
from service.config.logging import configure_logging
from service.config.secret_strength import is_guessable_apart
from service.config.settings import Settings, prepare_environment
from service.identity.database import DatabaseUnusableError, prepare_database
from service.telemetry.providers import Telemetry, build_telemetry

GC_THRESHOLDS = (20_000, 20, 50)
"""Thresholds of Python's cycle collector (its defaults are 700, 10 and 10). Together with ``gc.freeze`` they
save a fifth of a request's processor time."""

LISTENERS_PER_SOCKET = 32
"""Duplicates of a listening socket that are registered with the event loop. uvloop accepts one connection per
descriptor and iteration; with 60 requests in flight an iteration takes 30 ms, so that the last of 60 clients
that connect at the same time would wait for two seconds."""

IGNORED_SIGNALS = (
    *(signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT, signal.SIGALRM, signal.SIGVTALRM, signal.SIGPROF),
    *(signal.SIGWINCH, signal.SIGTTIN, signal.SIGTTOU),
    *(getattr(signal, name) for name in ("SIGIO", "SIGPWR", "SIGSTKFLT") if hasattr(signal, name)),
    *(range(signal.SIGRTMIN, signal.SIGRTMAX + 1) if hasattr(signal, "SIGRTMIN") else ()),
)
"""Signals that would end or stop the process, or make uvicorn change the number of workers. Those that report
an error of the process itself, or a limit of the system, keep their meaning."""

JOIN_INTERVAL_S = 0.1
"""Interval at which the parent process looks for signals while its workers stop."""

STARTUP_FAILURE = 3
"""uvicorn's exit status when the app does not start."""

logger = logging.getLogger(__name__)


class TelemetryVariablesError(Exception):
    """The SDK refused a value of the ``OTEL_*`` variables that it reads itself."""


def serve(settings: Settings) -> int:
    """Serve until a stop signal and return the process's exit status.

    SIGTERM, SIGINT and SIGHUP stop it. uvicorn raises the stop signal again after it has stopped. The
    handlers set here turn that into exit status 0, because a completed shutdown is a success for an
    orchestrator.
    """
    configure_logging(settings.log_level)
    try:
        # Once for all workers, so that there is one line where it cannot be used.
        prepare_database(settings)
    except DatabaseUnusableError as error:
        logger.error("Error: %s", error)  # noqa: TRY400 - not a bug
        return 1
    signal.signal(signal.SIGTERM, _exit_zero)
    signal.signal(signal.SIGINT, _exit_zero)
    handle_other_signals()
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
        _Supervisor(config, sockets=list(_duplicates(config.bind_socket()))).run()
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
    settings = read_settings(is_guessable_apart).settings
    if settings is None:
        raise SystemExit(1)
    prepare_environment(settings)
    # A worker is a new process, without its parent's handlers.
    handle_other_signals()
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


def handle_other_signals() -> None:
    """Stop on SIGHUP as on SIGTERM, and log and ignore ``IGNORED_SIGNALS``.

    A server that runs in a thread leaves the signals of its process alone.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    signal.signal(signal.SIGHUP, _pass_on_as_sigterm)
    for number in IGNORED_SIGNALS:
        signal.signal(number, _log_ignored)


def _pass_on_as_sigterm(_signal: int, _frame: FrameType | None) -> None:
    # Whoever handles SIGTERM at this moment handles it: this module, uvicorn, or the drain.
    signal.raise_signal(signal.SIGTERM)


def _log_ignored(number: int, _frame: FrameType | None) -> None:
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        logger.warning("Ignored %s", name)
    else:
        # The signal may have interrupted a logging call, with its locks, or a request, with its context.
        loop.call_soon_threadsafe(partial(logger.warning, "Ignored %s", name), context=Context())


class _Supervisor(Multiprocess):
    """uvicorn's parent process, which passes stop signals on to the workers until they have ended."""

    def __init__(self, config: uvicorn.Config, sockets: list[socket.socket]) -> None:
        super().__init__(config, sockets)
        # uvicorn takes these signals to restart its workers, and to change their number.
        for number in IGNORED_SIGNALS:
            signal.signal(number, _log_ignored)

    def handle_hup(self) -> None:
        """Stop; uvicorn would restart the workers."""
        self.handle_term()

    def join_all(self) -> None:
        """Wait for the workers, each of which decides whether another stop signal is a second one."""
        for worker in self.processes:
            while worker.exitcode is None:
                worker.process.join(JOIN_INTERVAL_S)
                if self.signal_queue:
                    self.signal_queue.clear()
                    self.terminate_all()


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
