"""Runs the app under uvicorn, the way this service wants it: JSON lines only, ids on every answer, exit 0."""

import asyncio
import gc
import logging
import os
import signal
import socket
from collections.abc import Iterator
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
from service.config.settings import Settings, prepare_environment
from service.telemetry.providers import Telemetry, build_telemetry

COLLECT_AFTER = (20_000, 20, 50)
"""Objects, and collections of the younger generations; Python's own are 700, 10 and 10. Together with
freezing it takes a fifth off a request's processor time."""

ACCEPTED_AT_ONCE = 32
STARTUP_FAILURE = 3
"""uvicorn's exit status where the app does not start."""

logger = logging.getLogger(__name__)


def build() -> FastAPI:
    """Build the app from the environment; each worker process of uvicorn calls this once.

    Raises:
        SystemExit: The configuration is not valid any more (the parent process had checked it).
    """
    settings = read_settings().settings
    if settings is None:
        raise SystemExit(1)
    prepare_environment(settings)
    telemetry = telemetry_or_problem(settings)
    if isinstance(telemetry, str):
        logger.error("Error: %s", telemetry)
        raise SystemExit(1)
    configure_logging(settings.log_level, telemetry.logger_provider)
    # For libraries that ask for the process's providers instead of being handed ours.
    trace.set_tracer_provider(telemetry.tracer_provider)
    metrics.set_meter_provider(telemetry.meter_provider)
    app = create_app(settings, telemetry)
    _spare_the_collector()
    return app


def _spare_the_collector() -> None:
    """Let Python's cycle collector run rarely, and over what requests leave behind only.

    What is there now stays to the end; a request makes thousands of objects and hardly a cycle.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*COLLECT_AFTER)


def telemetry_or_problem(settings: Settings) -> Telemetry | str:
    """The telemetry, or what the SDK has against its own variables, which it reads by itself."""
    try:
        return build_telemetry(settings)
    except Exception as error:  # noqa: BLE001 - the SDK has no one kind of error for this
        return f"The OTEL_* variables are not valid: {type(error).__name__}: {str(error)[:200]}"


def serve(settings: Settings) -> int:
    """Serve until a signal; the process's exit status.

    uvicorn raises the signal that stopped it once more when it is done, so that a shell sees it; for an
    orchestrator a finished stop is a success, so the signal then finds a handler that exits with 0.
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
        # Ours is in place; uvicorn's own lines go through it, and the request line has no query string.
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=bool(settings.forwarded_allow_ips),
        forwarded_allow_ips=settings.forwarded_allow_ips,
        # The drain has waited already; what is left now are connections that nobody closes.
        timeout_graceful_shutdown=1,
        # A request's context is its own, whatever the lifespan left in the one it was started from.
        reset_contextvars=True,
    )
    if settings.workers > 1:
        Multiprocess(config, sockets=list(several(config.bind_socket()))).run()
        return 0
    config.load_app()
    server = _Server(config)
    server.run()
    return 0 if server.started else STARTUP_FAILURE


class _Server(uvicorn.Server):
    """uvicorn's server, listening on each of its sockets several times."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start as uvicorn does, and add the others."""
        await super().startup(sockets)
        protocol = partial(
            cast("Any", self.config.http_protocol_class),
            config=self.config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
        )
        loop = asyncio.get_running_loop()
        for server in list(self.servers):
            for listening in server.sockets:
                for another in list(several(listening))[1:]:
                    self.servers.append(
                        await loop.create_server(protocol, sock=another, backlog=self.config.backlog)
                    )


def several(listening: socket.socket) -> Iterator[socket.socket]:
    """A listening socket, and more descriptors of the same.

    uvloop takes one new connection from each descriptor each time around its loop; with sixty requests under
    way once around takes 30 ms, and the last of sixty callers who connect at once would wait for two seconds.
    """
    yield listening
    for _ in range(ACCEPTED_AT_ONCE - 1):
        yield socket.socket(fileno=os.dup(listening.fileno()))


def _exit_zero(_signal: int, _frame: FrameType | None) -> None:
    # The interpreter's last collection would go over all that the SDKs brought in, for half a second or more.
    gc.freeze()
    raise SystemExit(0)
