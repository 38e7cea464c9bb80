"""``python -m service``: serve (the default), ``check`` the configuration, ``replay`` the spool."""

import argparse
import json
import logging
import sys
import time
from types import TracebackType
from typing import NoReturn


class EarlyFormatter(logging.Formatter):
    """The required fields of a line, and an exception where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its line feed."""
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


def configure_early_logging() -> None:
    """Let every line of the process be JSON until ``configure_logging`` takes over."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(EarlyFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(capture=True)
    sys.excepthook = _log_uncaught


def _log_uncaught(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    logging.getLogger("service").critical("Uncaught exception", exc_info=(kind, error, where))


logger = logging.getLogger("service")


class JsonParser(argparse.ArgumentParser):
    """A command line whose help and complaints are JSON lines too."""

    def print_help(self, file: object = None) -> None:
        """Log the help."""
        del file
        logger.info("%s", self.format_help())

    def error(self, message: str) -> NoReturn:
        """Log what is wrong with the command, and exit with status 2."""
        logger.error("Error: %s", message)
        raise SystemExit(2)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the process's exit status.

    0 is success, 1 a refused configuration or records that could not be replayed, 2 a wrong command.
    """
    # Before anything else is imported: whatever happens from here on comes out as JSON.
    configure_early_logging()
    parser = JsonParser(prog="python -m service", description=__doc__)
    parser.add_argument(
        "command",
        nargs="?",
        choices=("serve", "check", "replay"),
        default="serve",
        help="serve: run the service; check: print every problem of the configuration and exit; "
        "replay: bring the records of processes that ended to MLflow and exit",
    )
    command = parser.parse_args(arguments).command

    # Imported late, so that a wrong command costs nothing.
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
    from service.server import serve, telemetry_or_problem  # noqa: PLC0415

    if command == "check":
        # Built to see whether it can be, and gone with this process before anything is sent.
        problem = telemetry_or_problem(report.settings)
        if isinstance(problem, str):
            logger.error("Error: %s", problem)
            return 1
        logger.info("The configuration is valid")
        return 0
    if command == "replay":
        from service.recording.recorder import replay  # noqa: PLC0415 - as above

        return replay(report.settings)
    return serve(report.settings)


if __name__ == "__main__":
    sys.exit(main())
