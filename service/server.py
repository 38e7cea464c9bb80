"""Runs the app under uvicorn, the way this service wants it: JSON lines only, ids on every answer, exit 0."""

import gc
import logging
import signal
from types import FrameType

import uvicorn
from fastapi import FastAPI
from opentelemetry import metrics, trace

from service.app import create_app
from service.config.env_validator import read_settings
from service.config.logging import configure_logging
from service.config.settings import Settings, prepare_environment
from service.telemetry.providers import Telemetry, build_telemetry

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
    return create_app(settings, telemetry)


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
    uvicorn.run(
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
    return 0


def _exit_zero(_signal: int, _frame: FrameType | None) -> None:
    # The interpreter's last collection would go over all that the SDKs brought in, for half a second or more.
    gc.freeze()
    raise SystemExit(0)
