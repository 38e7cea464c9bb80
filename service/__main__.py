"""``python -m service``: serve (the default), ``check`` the configuration, ``replay`` orphaned spools."""

import argparse
import json
import logging
import os
import sys
import time
from types import TracebackType
from typing import NoReturn

logger = logging.getLogger("service")


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return the process's exit status.

    0 is success, 1 a refused configuration or records that could not be replayed, 2 a wrong command.
    """
    # Before any file is created: the store and the spool hold prompts and answers, for this user only.
    os.umask(0o077)
    # Before any other import, so that a failing import is logged as JSON too.
    configure_early_logging()
    parser = JsonParser(prog="python -m service", description=__doc__)
    parser.add_argument(
        "command",
        nargs="?",
        choices=("serve", "check", "replay"),
        default="serve",
        help="serve: run the service; check: report every problem of the configuration and exit; "
        "replay: send the call records of processes that have ended to MLflow and exit",
    )
    command = parser.parse_args(arguments).command

    # Imported after the arguments are parsed, so that a wrong command fails at once.
    from service.config.env_validator import read_settings  # noqa: PLC0415
    from service.config.logging import configure_logging  # noqa: PLC0415

    report = read_settings()
    configure_logging()
    for warning in report.warnings:
        logger.warning("Warning: %s", warning)
    for error in report.errors:
        logger.error("Error: %s", error)
    if report.settings is None:
        return 1

    from service.config.settings import prepare_environment  # noqa: PLC0415

    prepare_environment(report.settings)
    # Imported last: the OpenTelemetry packages read the environment when they are imported.
    from service.server import TelemetryVariablesError, load_telemetry, serve  # noqa: PLC0415

    if command == "check":
        try:
            load_telemetry(report.settings)
        except TelemetryVariablesError as error:
            logger.error("Error: %s", error)  # noqa: TRY400 - a problem of the configuration, not a bug
            return 1
        logger.info("The configuration is valid")
        return 0
    if command == "replay":
        from service.recording.recorder import replay  # noqa: PLC0415 - as above

        return replay(report.settings)
    return serve(report.settings)


class JsonParser(argparse.ArgumentParser):
    """An argument parser that logs its help and its errors."""

    def print_help(self, file: object = None) -> None:
        """Log the help."""
        del file
        logger.info("%s", self.format_help())

    def error(self, message: str) -> NoReturn:
        """Log the error and exit with status 2."""
        logger.error("Error: %s", message)
        raise SystemExit(2)


def configure_early_logging() -> None:
    """Log JSON lines until ``configure_logging`` takes over.

    Uses the standard library only: ``config.logging`` imports OpenTelemetry, and that import can fail.
    """
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(EarlyFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(capture=True)
    sys.excepthook = _log_uncaught


class EarlyFormatter(logging.Formatter):
    """Formats a record as a line of JSON with the required fields and the exception."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without its line feed."""
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "timestamp": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "message": record.getMessage(),
            "logger": record.name,
        }
        if record.exc_info:
            line["exception.stacktrace"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _log_uncaught(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    logger.critical("Uncaught exception", exc_info=(kind, error, where))


if __name__ == "__main__":
    sys.exit(main())
