"""Callers whose bodies are too large, or never come: by hand on a socket, since no library would do it."""

import select
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPResponse

from tests.harness import Answer

CHUNK = 65_536


@dataclass
class Sender:
    """One connection, with a request's headers sent; ``sent`` counts the bytes of the body."""

    connection: socket.socket
    started: float
    sent: int = 0

    def send(self, data: bytes) -> None:
        """Send a piece of the body as it is."""
        self.connection.sendall(data)
        self.sent += len(data)

    def send_chunked(self, total: int) -> None:
        """Send a chunked body until the service answers: between two pieces there is a look for an answer."""
        piece = b"%x\r\n" % CHUNK + b" " * CHUNK + b"\r\n"
        while self.sent < total and not self.answered(0.001):
            self.send(piece)

    def drip(self, interval_s: float, limit_s: float) -> None:
        """Send a byte at a time until the service answers."""
        while time.monotonic() < self.started + limit_s and not self.answered(interval_s):
            self.send(b" ")

    def answered(self, within_s: float) -> bool:
        """Whether something has come."""
        return bool(select.select([self.connection], [], [], within_s)[0])

    def answer(self) -> Answer:
        """The answer, whole."""
        response = HTTPResponse(self.connection)
        response.begin()
        body = response.read()
        headers = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, headers, body, time.monotonic() - self.started)

    def closed(self) -> bool:
        """Whether the service ends the connection, in order, and says nothing more."""
        return self.connection.recv(1) == b""


@contextmanager
def promising(port: int, headers: Mapping[str, str], timeout_s: float = 5) -> Iterator[Sender]:
    """Send the headers of a model call on a connection of its own; the body is up to the block."""
    fields = {"Host": "127.0.0.1", "Content-Type": "application/json", **headers}
    lines = ["POST /llm/generate HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
    with socket.create_connection(("127.0.0.1", port), timeout=timeout_s) as connection:
        connection.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
        yield Sender(connection, time.monotonic())
