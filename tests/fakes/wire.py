"""HTTP/1.1 by hand on asyncio streams: no library would let the fake upstream misbehave."""

from __future__ import annotations

import asyncio
import json
import select
import socket
import struct
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_READ_LIMIT = 2**20


@dataclass(frozen=True)
class Head:
    """The request line and the header block of a request."""

    method: str
    path: str
    query: str
    headers: dict[str, str]


@dataclass(frozen=True)
class SeenRequest:
    """A request as it arrived; header names are lower case and `at` is time.monotonic()."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    at: float
    query: str = field(default="", kw_only=True)

    @property
    def json(self) -> Any:
        """The decoded body."""
        return json.loads(self.body)


class WatchfulReader(asyncio.StreamReader):
    """A stream reader that tells at once that the peer has gone, without anyone reading from it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(limit=_READ_LIMIT, loop=loop)
        self.gone = asyncio.Event()

    def feed_eof(self) -> None:
        """Note the orderly end of the connection."""
        super().feed_eof()
        self.gone.set()

    def set_exception(self, exc: Exception) -> None:
        """Note the violent end of the connection."""
        super().set_exception(exc)
        self.gone.set()


async def read_head(reader: asyncio.StreamReader) -> Head | None:
    """Read the next request's head; None when the client left instead of sending one."""
    try:
        block = await reader.readuntil(b"\r\n\r\n")
    except (asyncio.IncompleteReadError, OSError):
        return None
    request_line, *lines = block.decode("latin-1").strip("\r\n").split("\r\n")
    method, target, _version = request_line.split(" ")
    path, _, query = target.partition("?")
    pairs = (line.split(":", 1) for line in lines)
    return Head(method, path, query, {name.strip().lower(): value.strip() for name, value in pairs})


async def read_body(reader: asyncio.StreamReader, head: Head) -> bytes | None:
    """Read the request's body, chunked or counted; None when the client left in the middle of it."""
    try:
        if head.headers.get("transfer-encoding", "").lower() == "chunked":
            return await _read_chunks(reader)
        return await reader.readexactly(int(head.headers.get("content-length", "0")))
    except (asyncio.IncompleteReadError, OSError):
        return None


async def _read_chunks(reader: asyncio.StreamReader) -> bytes:
    body = b""
    while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
        body += await reader.readexactly(size)
        await reader.readexactly(2)
    while (await reader.readuntil(b"\r\n")) != b"\r\n":
        pass  # a trailer
    return body


@contextmanager
def noticing_hangup_unread(writer: asyncio.StreamWriter, gone: asyncio.Event) -> Iterator[None]:
    """Read nothing more from the connection and still set the event when its client leaves (on Linux)."""
    transport = writer.transport
    if isinstance(transport, asyncio.Transport):
        transport.pause_reading()
    if sys.platform != "linux":
        yield
        return
    # A paused transport sees no end of file, but the kernel can report the peer's FIN apart from its data.
    loop = asyncio.get_running_loop()
    with select.epoll() as hangup:
        hangup.register(writer.get_extra_info("socket").fileno(), select.EPOLLRDHUP)
        loop.add_reader(hangup.fileno(), gone.set)
        try:
            yield
        finally:
            loop.remove_reader(hangup.fileno())


def encode_head(status: int, headers: Mapping[str, str]) -> bytes:
    """Return the status line and the header block of a response, with the empty line."""
    known = status in {item.value for item in HTTPStatus}
    reason = HTTPStatus(status).phrase if known else "Unknown"
    lines = [f"HTTP/1.1 {status} {reason}", *(f"{name}: {value}" for name, value in headers.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def _chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


class Exchange:
    """One request and the half-written answer to it."""

    def __init__(self, request: SeenRequest, writer: asyncio.StreamWriter) -> None:
        self.request = request
        self._writer = writer
        self.complete = False
        self.keep_alive = request.headers.get("connection", "").lower() != "close"

    async def send(self, data: bytes, *, last: bool = False) -> None:
        """Put bytes on the wire; the last ones make the answer complete."""
        # Set before writing: the client may close as soon as it has the last byte, before we run again.
        self.complete = self.complete or last
        self._writer.write(data)
        await self._writer.drain()

    async def send_head(self, status: int, headers: Mapping[str, str]) -> None:
        """Put a response's head on the wire, telling the client when the connection will close."""
        closing = {} if self.keep_alive else {"Connection": "close"}
        await self.send(encode_head(status, {**headers, **closing}))

    async def respond(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        """Answer properly with a body of known length."""
        await self.send_head(status, {**headers, "Content-Length": str(len(body))})
        await self.send(body, last=True)

    async def send_chunk(self, data: bytes) -> None:
        """Put one chunk of a chunked body on the wire."""
        await self.send(_chunk(data))

    async def send_last_chunk(self, data: bytes) -> None:
        """Put the last chunk and the end of a chunked body on the wire."""
        await self.send(_chunk(data) + _chunk(b""), last=True)

    def hang_up(self) -> None:
        """Close the connection after what has been written, as if the answer were complete."""
        self.complete = True
        self.keep_alive = False

    def reset(self) -> None:
        """Break the connection with a TCP RST instead of a FIN."""
        self.hang_up()
        linger_0 = struct.pack("ii", 1, 0)
        self._writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger_0)
        self._writer.transport.abort()
