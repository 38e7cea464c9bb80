"""HTTP/1.1 requests and answers as bytes: no library would send what an attacker sends."""

import re
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

READ_BYTES = 65_536
PACKET_GAP_S = 0.001
"""Pause between two packets, so that the service reads them one by one."""

PROMPT = b'{"prompt": "h"}'

UPGRADES = ("h2c", "websocket", "anything")
AMBIGUOUS_FRAMING = (
    ("Content-Length: 15", "Transfer-Encoding: chunked"),
    ("Content-Length: 15", "Content-Length: 15"),
    ("Content-Length: 15, 15",),
    ("Content-Length: +15",),
    ("Content-Length: 0x0f",),
    ("Transfer-Encoding: gzip, chunked",),
    ("Transfer-Encoding: chunked", "Transfer-Encoding: chunked"),
    ("Transfer-Encoding: xchunked",),
    ("Transfer-Encoding : chunked",),
)
"""Header fields that two readers could understand differently, in front of ``PROMPT``."""

BROKEN_CHUNKS = (
    b"f\n" + PROMPT + b"\n0\n\n",
    b"-f\r\n" + PROMPT + b"\r\n0\r\n\r\n",
    b"0xf\r\n" + PROMPT + b"\r\n0\r\n\r\n",
    b"e\r\n" + PROMPT + b"\r\n0\r\n\r\n",
    b"f\r\n" + PROMPT + b"XX0\r\n\r\n",
    b"ffffffffffffffff\r\n" + PROMPT,
    b"f;" + b"a" * 300 + b"\r\n" + PROMPT + b"\r\n0\r\n\r\n",
    b"f\r\n" + PROMPT + b"\r\n0\r\nno colon\r\n\r\n",
)
"""Chunked bodies that break RFC 9112, section 7.1."""

STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) [^\r\n]*")
FIELD = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):[ \t]*(.*?)[ \t]*")


def head(
    method: str, path: str, token: str = "", fields: Sequence[str] = (), *, close: bool = False
) -> bytes:
    """Return a request's head."""
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json", *fields]
    if token:
        lines.append(f"Authorization: Bearer {token}")
    if close:
        lines.append("Connection: close")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def chunked(body: bytes) -> bytes:
    """Return a body as one chunk."""
    return b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)


class NotHttpError(Exception):
    """The service sent bytes that are not an HTTP/1.1 answer."""


@dataclass(frozen=True)
class RawAnswer:
    """One answer as it came; header names in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def request_id(self) -> str:
        """The header, empty where it is missing."""
        return self.headers.get("x-request-id", "")

    @property
    def closes(self) -> bool:
        """Whether the service announces the end of the connection."""
        return self.headers.get("connection", "").lower() == "close"


def answers_in(data: bytes, methods: Sequence[str] = ()) -> tuple[list[RawAnswer], bytes]:
    """Return the complete answers at the start of ``data``, and the rest.

    Args:
        data: What a connection received.
        methods: The requests' methods, in order: an answer to HEAD has no body.

    Raises:
        NotHttpError: There is something else than answers.
    """
    found: list[RawAnswer] = []
    while data:
        end = data.find(b"\r\n\r\n")
        if end < 0:
            break
        lines = data[:end].split(b"\r\n")
        status_line = STATUS.fullmatch(lines[0])
        fields = [FIELD.fullmatch(line) for line in lines[1:]]
        if status_line is None or not all(fields):
            raise NotHttpError(repr(data[:end][:300]))
        headers = {
            field[1].decode("latin-1").lower(): field[2].decode("latin-1") for field in fields if field
        }
        status = int(status_line[1])
        rest = data[end + 4 :]
        if 100 <= status < 200:
            data = rest
            continue
        bodiless = status in {204, 304} or (len(found) < len(methods) and methods[len(found)] == "HEAD")
        taken = (b"", rest) if bodiless else _body(headers, rest)
        if taken is None:
            break
        body, data = taken
        found.append(RawAnswer(status, headers, body))
    return found, data


def _body(headers: dict[str, str], data: bytes) -> tuple[bytes, bytes] | None:
    """Return a body and what follows it; None where it is not complete."""
    if headers.get("transfer-encoding") != "chunked":
        if "content-length" not in headers:
            raise NotHttpError(f"an answer without a length: {headers}")
        length = int(headers["content-length"])
        return (data[:length], data[length:]) if len(data) >= length else None
    body = b""
    while True:
        line, found, rest = data.partition(b"\r\n")
        if not found:
            return None
        size = int(line, 16)
        if len(rest) < size + 2:
            return None
        if rest[size : size + 2] != b"\r\n":
            raise NotHttpError(repr(rest[size : size + 20]))
        body, data = body + rest[:size], rest[size + 2 :]
        if not size:
            return body, data


@contextmanager
def connection(port: int, address: str = "127.0.0.1", timeout_s: float = 10.0) -> Iterator[socket.socket]:
    """Connect to the service from an address of this machine; a reset ends the connection.

    Without the reset each connection would leave an entry in the kernel's table for a minute.
    """
    with socket.create_connection(("127.0.0.1", port), timeout_s, (address, 0)) as made:
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            yield made
        finally:
            reset_on_close(made)


def reset_on_close(made: socket.socket) -> None:
    """Let the end of the connection be a reset."""
    with suppress(OSError):
        made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@dataclass(frozen=True)
class Conversation:
    """What came back on one connection."""

    answers: list[RawAnswer]
    rest: bytes
    """Bytes after the last complete answer."""

    closed: bool
    """Whether the service closed the connection."""

    @property
    def statuses(self) -> list[int]:
        """The answers' statuses, in order."""
        return [answer.status for answer in self.answers]


def converse(  # noqa: PLR0913 - what there is to say about a conversation
    port: int,
    packets: Sequence[bytes],
    *,
    expected: int = 1_000,
    methods: Sequence[str] = (),
    address: str = "127.0.0.1",
    timeout_s: float = 5.0,
    linger_s: float = 0.0,
) -> Conversation:
    """Send packets, and read until the service closes or so many answers have come.

    Args:
        port: The service's port.
        packets: What is sent, one write each.
        expected: How many answers are waited for; by default the end of the connection is.
        methods: The requests' methods, as for ``answers_in``.
        address: The caller's address.
        timeout_s: How long the next byte is waited for.
        linger_s: How long more answers than expected are waited for.
    """
    data, closed = b"", False
    with connection(port, address, timeout_s) as made:
        for number, packet in enumerate(packets):
            if number:
                time.sleep(PACKET_GAP_S)
            try:
                made.sendall(packet)
            except OSError:
                # What was answered before is still read.
                break
        while True:
            answers, rest = answers_in(data, methods)
            if len(answers) >= expected:
                made.settimeout(linger_s or 0.000_001)
            try:
                piece = made.recv(READ_BYTES)
            except (TimeoutError, BlockingIOError):
                break
            except OSError:
                closed = True
                break
            if not piece:
                closed = True
                break
            data += piece
    return Conversation(answers, rest, closed)
