"""``python -m service``: ``serve`` (the default) and other commands.

They are ``check``, ``migrate``, ``replay``, ``keys``, ``usage`` and ``explain``.
"""

import argparse
import gc
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import NoReturn, TextIO

IDENTITY_COMMANDS = frozenset({"keys", "usage"})
EXPLAIN = "explain"
PRINTING = IDENTITY_COMMANDS | {EXPLAIN}
"""Commands that print for people and programs; their log lines go to stderr, out of the way."""

logger = logging.getLogger("service")


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return the process's exit status.

    0 is success, 1 a refused configuration or a command that failed, 2 a wrong command.
    """
    # Before any file is created: the store and the spool hold prompts and answers, for this user only.
    os.umask(0o077)
    named = (sys.argv[1:] if arguments is None else arguments)[:1]
    log_stream = sys.stdout if PRINTING.isdisjoint(named) else sys.stderr
    # Before any other import, so that a failing import is logged as JSON too.
    configure_early_logging(log_stream)
    parser = JsonParser(prog="python -m service", description=__doc__)
    commands = parser.add_subparsers(dest="command", parser_class=JsonParser)
    commands.add_parser("serve", help="run the service; the default")
    commands.add_parser("check", help="report every problem of the configuration and exit")
    commands.add_parser(
        "replay", help="send the call records of processes that have ended to MLflow, book them, and exit"
    )
    commands.add_parser("migrate", help="create the database's tables, or bring them up to date, and exit")
    if not IDENTITY_COMMANDS.isdisjoint(named):
        # Its module takes half a second to import, which is nothing beside the command itself.
        from service.identity.commands import add_parsers  # noqa: PLC0415

        add_parsers(commands)
    else:
        commands.add_parser("keys", help="make, list, revoke and rotate API keys", add_help=False)
        commands.add_parser("usage", help="show calls, tokens and cost", add_help=False)
    if EXPLAIN in named:
        from service.explain import command as explain  # noqa: PLC0415 - as above

        explain.add_parser(commands)
        return explain.run(parser.parse_args(arguments))
    commands.add_parser(EXPLAIN, help="say what became of a request, by one of its ids", add_help=False)
    given = parser.parse_args(arguments)
    command = given.command or "serve"

    with garbage_collector_off():
        # Imported after the arguments are parsed, so that a wrong command fails at once.
        from service.config.env_validator import read_settings  # noqa: PLC0415
        from service.config.logging import configure_logging  # noqa: PLC0415
        from service.config.secret_strength import is_guessable_apart  # noqa: PLC0415

        report = read_settings(is_guessable_apart)
        configure_logging(stream=sys.stderr if command in IDENTITY_COMMANDS else None)
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
    if command in IDENTITY_COMMANDS | {"migrate", "replay"}:
        from service.identity.commands import run  # noqa: PLC0415 - as above

        return run(report.settings, command, given)
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


@contextmanager
def garbage_collector_off() -> Iterator[None]:
    """Run imports without the garbage collector, which takes a fifth of their time and finds little."""
    gc.disable()
    try:
        yield
    finally:
        # Otherwise the next collection would look through all of it.
        gc.freeze()
        gc.enable()


def configure_early_logging(stream: TextIO) -> None:
    """Log JSON lines until ``configure_logging`` takes over.

    Uses the standard library only: ``config.logging`` imports OpenTelemetry, and that import can fail.
    """
    handler = logging.StreamHandler(stream)
    handler.setFormatter(EarlyFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    # Alembic names each of its own modules when it is imported.
    logging.getLogger("alembic.runtime.plugins").setLevel(logging.WARNING)
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
