"""JSON lines before anything else is imported: the standard library only.

OpenTelemetry reads the environment when it is imported, and complains about it there.
"""

import json
import logging
import sys
import time
from types import TracebackType


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
