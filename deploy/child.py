"""A child process with its log file."""

import os
import shlex
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, Self

LAST_LINES: Final = 20


class DemoError(Exception):
    """The reason why the demo cannot continue, for the person who runs it."""


class Child:
    """A running process whose output goes to a log file; leaving the context stops it.

    It has a session of its own: Ctrl-C in the terminal reaches only the demo, which then stops the process.
    """

    def __init__(
        self, name: str, command: Sequence[str], *, env: Mapping[str, str], log: Path, stop_timeout_s: float
    ) -> None:
        self.name = name
        self.log = log
        self._stop_timeout_s = stop_timeout_s
        try:
            with log.open("wb") as output:
                self._process = subprocess.Popen(
                    command,
                    env=env,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as error:
            raise DemoError(f"{name} cannot be started with `{shlex.join(command)}`: {error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def wait(self, timeout_s: float) -> int:
        """Wait for the process to end and return its exit status, or raise subprocess.TimeoutExpired."""
        return self._process.wait(timeout_s)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the process and its children."""
        os.killpg(self._process.pid, number)

    def raise_if_ended(self) -> None:
        """Raise DemoError with the last lines of the log if the process has ended."""
        status = self._process.poll()
        if status is not None:
            raise DemoError(f"{self.name} ended with status {status}. {self.last_lines()}")

    def last_lines(self) -> str:
        """Return the last lines of the log, below a heading with the file's name."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
        return "\n".join([f"The last lines of {self.log}:", *(f"  {line}" for line in lines)])

    def stop(self) -> None:
        """Stop the process with SIGTERM; after the time limit, kill it and its children."""
        if self._process.poll() is not None:
            return
        self._process.terminate()
        try:
            self.wait(self._stop_timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
