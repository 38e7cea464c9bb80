"""A process that the demo starts, watches and stops."""

import os
import shlex
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, Self

LAST_LINES: Final = 20


class DemoError(Exception):
    """What a person must be told when the demo cannot go on."""


class Child:
    """A running process with its output in a log file; leaving the context stops it.

    It has a session of its own, so that a terminal's Ctrl-C reaches the demo alone, which stops it in turn.
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
        """Return the process's status once it has ended, or raise subprocess.TimeoutExpired."""
        return self._process.wait(timeout_s)

    def send(self, number: signal.Signals) -> None:
        """Send it, and what it started, a signal."""
        os.killpg(self._process.pid, number)

    def raise_if_ended(self) -> None:
        """Raise DemoError, with the last lines of the log, when the process is gone."""
        status = self._process.poll()
        if status is not None:
            raise DemoError(f"{self.name} ended with status {status}. {self.last_lines()}")

    def last_lines(self) -> str:
        """Return the end of the log, under a heading that names the file."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
        return "\n".join([f"The last lines of {self.log}:", *(f"  {line}" for line in lines)])

    def stop(self) -> None:
        """Ask the process to stop; when the time limit passes, kill it and what it started."""
        if self._process.poll() is not None:
            return
        self._process.terminate()
        try:
            self.wait(self._stop_timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
