"""uvicorn's HTTP/1.1 protocol with this service's own message framing.

llhttp (httptools) parses one request head at a time and nothing else. Where a body ends is decided here,
strictly as RFC 9112 has it, so that no byte of one message can be read as the start of another: uvicorn feeds
llhttp whatever arrives, appends trailers to the request's header fields, and stops reading a body when a
client offers ``Upgrade``. h11 frames messages as strictly and costs 133 microseconds more for a request (142
against 9, measured on the two parsers alone), a tenth of what a request takes here.
"""

import asyncio
import re
import socket
import struct
import sys
from collections.abc import Iterable
from contextvars import Context
from typing import TYPE_CHECKING, Any, ClassVar, Final, cast

import httptools
from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from service.middleware.request_limits import MALFORMED
from service.utils.disconnect import ABORT, CUT

if TYPE_CHECKING:
    from uvicorn._types import ASGI3Application

MAX_HEAD_BYTES: Final = 65_536
"""Largest request head. During an answer, reading pauses when more than this of what follows has arrived."""

MAX_FIELDS: Final = 100
"""Most header fields of a request, as in Apache httpd (LimitRequestFields)."""

MAX_TRAILER_BYTES: Final = 8_192
MAX_CHUNK_LINE_BYTES: Final = 256
"""Longest line with a chunk's size; extensions stand there, which nobody uses (RFC 9112, section 7.1.1)."""

FRAMING_PER_PAYLOAD: Final = 8
"""Bytes of chunk lines permitted for each byte of payload, beyond the first 64 kB of them: a body in chunks
of one byte passes, one that is all framing does not."""

CUT_TIMEOUT_S: Final = 5.0
"""Seconds that a client has to read what was written before its connection ends."""

TCP_NOTSENT_LOWAT: Final = 25
"""Linux's number of the socket option (tcp(7)); Python names it from 3.12 on."""

MAX_UNSENT_BYTES: Final = 131_072
"""Bytes of an answer that the kernel holds beyond those under way to the client; without a limit it takes
megabytes for a client that does not read."""

CHUNK_LINE: Final = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\r\n]*)?")
TRAILER_LINE: Final = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[^\r\n\0]*")
METHOD: Final = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]{1,32}(?: |\Z)|\r?\Z")
"""The start of a head, complete or not; bytes that cannot become a method are refused at once."""

HTTP_1_0: Final = "1.0"
VERSIONS: Final = frozenset({HTTP_1_0, "1.1"})
CRLF: Final = b"\r\n"
HEAD_END: Final = b"\r\n\r\n"


class MalformedError(Exception):
    """The bytes are not an HTTP/1.1 request, or exceed a limit of one."""


class SizedBody:
    """A body whose length the head declares."""

    def __init__(self, size: int) -> None:
        self._left = size

    def take(self, received: bytearray) -> tuple[bytes, bool]:
        """Remove the body's bytes from ``received``; the payload, and whether the body is complete."""
        data = bytes(received[: self._left])
        del received[: self._left]
        self._left -= len(data)
        return data, self._left == 0


class ChunkedBody:
    """A body in chunks (RFC 9112, section 7.1).

    Chunk extensions and trailers are checked, bounded and discarded.
    """

    def __init__(self) -> None:
        self._left = 0
        self._in_chunk = False
        self._in_trailers = False
        self._trailer_bytes = 0
        self._framing_bytes = 0
        self._payload_bytes = 0

    def take(self, received: bytearray) -> tuple[bytes, bool]:
        """Remove what belongs to the body from ``received``; the payload, and whether the body is complete.

        Raises:
            MalformedError: The framing is broken, or too large for its payload.
        """
        payload: list[bytes] = []
        while received:
            if self._in_chunk and self._left:
                payload.append(bytes(received[: self._left]))
                del received[: self._left]
                self._left -= len(payload[-1])
                self._payload_bytes += len(payload[-1])
                continue
            line = self._line(received)
            if line is None:
                break
            if self._in_trailers:
                if not line:
                    return b"".join(payload), True
                if not TRAILER_LINE.fullmatch(line):
                    raise MalformedError
            elif self._in_chunk:
                if line:
                    raise MalformedError
                self._in_chunk = False
            else:
                self._begin_chunk(line)
        return b"".join(payload), False

    def _line(self, received: bytearray) -> bytes | None:
        """Remove the next line; None where its end has not arrived."""
        limit = MAX_TRAILER_BYTES - self._trailer_bytes if self._in_trailers else MAX_CHUNK_LINE_BYTES
        end = received.find(CRLF, 0, limit + len(CRLF))
        if end < 0:
            if len(received) > limit:
                raise MalformedError
            return None
        line = bytes(received[:end])
        del received[: end + len(CRLF)]
        if self._in_trailers:
            self._trailer_bytes += end + len(CRLF)
        self._framing_bytes += end + len(CRLF)
        if self._framing_bytes > MAX_HEAD_BYTES + FRAMING_PER_PAYLOAD * self._payload_bytes:
            raise MalformedError
        return line

    def _begin_chunk(self, line: bytes) -> None:
        size = CHUNK_LINE.fullmatch(line)
        if size is None:
            raise MalformedError
        self._left = int(size[1], 16)
        self._in_chunk = self._left > 0
        self._in_trailers = self._left == 0


def body_of(headers: Iterable[tuple[bytes, bytes]], http_version: str) -> SizedBody | ChunkedBody | None:
    """How the body after a head is framed; None where there is none.

    Raises:
        MalformedError: The head declares two lengths, or a transfer coding other than ``chunked`` alone.
    """
    lengths = [value for name, value in headers if name == b"content-length"]
    codings = [value for name, value in headers if name == b"transfer-encoding"]
    if codings:
        if lengths or len(codings) > 1 or codings[0].lower() != b"chunked" or http_version != "1.1":
            raise MalformedError
        return ChunkedBody()
    if not lengths:
        return None
    if len(lengths) > 1 or not lengths[0].isdigit() or len(lengths[0]) > 15:  # noqa: PLR2004 - a petabyte
        raise MalformedError
    return SizedBody(int(lengths[0])) if int(lengths[0]) else None


class Protocol(HttpToolsProtocol):
    """Serves one request after the other, and closes the connection on anything that it does not understand.

    A malformed request is answered through the app, so that it has an id, a span, and the errors' shape;
    uvicorn's own answer is plain text without a trace. A client that does not finish a request's head in time
    is disconnected. Bodies have a time limit of their own in the middleware. ``Upgrade`` is ignored (RFC
    9110, section 7.8).
    """

    head_timeout_s: ClassVar[float] = 10.0

    _head_timer: asyncio.TimerHandle | None = None
    _body: SizedBody | ChunkedBody | None = None
    _scanned = 0
    _refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first request's head."""
        super().connection_made(transport)
        connection = transport.get_extra_info("socket")
        if connection is not None and sys.platform == "linux":
            connection.setsockopt(socket.IPPROTO_TCP, TCP_NOTSENT_LOWAT, MAX_UNSENT_BYTES)
        self._received = bytearray()
        self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget what was received."""
        self._received.clear()
        self._cancel_head_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take bytes; at most one request is handed to the app at a time."""
        self._unset_keepalive_if_required()
        if not self._refused and not self.transport.is_closing():
            self._received += data
            self._advance()

    def on_response_complete(self) -> None:
        """Go on with the next request, where it has arrived already."""
        super().on_response_complete()
        if self._received and not self._refused and not self.transport.is_closing():
            self._unset_keepalive_if_required()
            self._advance()

    def on_headers_complete(self) -> None:
        """Decide how the body is framed, then hand the request to the app; llhttp calls it."""
        version = self.parser.get_http_version()
        hosts = sum(name == b"host" for name, _ in self.headers)
        # llhttp reads HTTP/0.9 and HTTP/2.0, too. A proxy in front goes by Host (RFC 9112, section 3.2).
        if version not in VERSIONS or hosts > 1 or (version == "1.1" and not hosts):
            raise MalformedError
        self._body = body_of(self.headers, version)
        self.app = cast("ASGI3Application", self.config.loaded_app)
        if version == HTTP_1_0:
            # A client of HTTP/1.0 does not know of 100 (Continue) either (RFC 9110, section 10.1.1).
            self.expect_100_continue = False
            self.app = self._answer_without_chunks
        super().on_headers_complete()
        cast("dict[str, Any]", self.scope)[ABORT] = self._abort
        cast("dict[str, Any]", self.scope)[CUT] = self._cut

    async def _answer_without_chunks(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the app; a body of unknown length ends with the connection (RFC 9112, section 6.3).

        uvicorn sends such a body in chunks, which HTTP/1.0 does not have.
        """
        cycle: RequestResponseCycle = self.cycle
        unknown_length = False

        async def send_without_chunks(message: Message) -> None:
            nonlocal unknown_length
            if message["type"] == "http.response.start":
                unknown_length = all(name.lower() != b"content-length" for name, _ in message["headers"])
                if unknown_length:
                    cycle.chunked_encoding = cycle.keep_alive = False
            elif unknown_length:
                # uvicorn compares what is sent with the length that was announced.
                cycle.expected_content_length = len(message.get("body", b""))
            await send(message)

        await self.config.loaded_app(scope, receive, send_without_chunks)

    def _abort(self) -> None:
        cycle: RequestResponseCycle | None = self.cycle
        if cycle is not None:
            # Otherwise uvicorn logs an error about the answer that is not complete.
            cycle.disconnected = True
        self.transport.abort()

    def _cut(self) -> None:
        cycle: RequestResponseCycle | None = self.cycle
        if cycle is not None and not cycle.chunked_encoding:
            # Without chunks the end of the connection is the end of the answer, unless it is a reset.
            link: socket.socket = self.transport.get_extra_info("socket")
            link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._abort()
            return
        if cycle is not None:
            # As in ``_abort``.
            cycle.disconnected = True
        self.transport.close()
        # A client that does not read would keep the connection for ever.
        self.loop.call_later(CUT_TIMEOUT_S, self.transport.abort)

    def on_message_complete(self) -> None:
        """Do nothing: llhttp calls it after a head without a body; where a message ends is decided here."""

    def _advance(self) -> None:
        """Read as much of what was received as can be read now."""
        try:
            while self._received:
                if self._body is not None:
                    data, complete = self._body.take(self._received)
                    if data:
                        self.on_body(data)
                    if not complete:
                        return
                    self._end_message()
                elif self._answering:
                    if len(self._received) > MAX_HEAD_BYTES:
                        self.flow.pause_reading()
                    return
                elif not self._read_head():
                    return
        except MalformedError:
            self._refused = True
            self._received.clear()
            self._cancel_head_timer()
            self.send_400_response("")

    @property
    def _answering(self) -> bool:
        cycle: RequestResponseCycle | None = self.cycle
        return cycle is not None and not cycle.response_complete

    def _read_head(self) -> bool:
        """Parse the next head; False where its end has not arrived."""
        received = self._received
        while received.startswith(CRLF):  # RFC 9112, section 2.2
            del received[: len(CRLF)]
        end = received.find(HEAD_END, max(0, self._scanned - len(HEAD_END)))
        if end < 0:
            if len(received) > MAX_HEAD_BYTES or not METHOD.match(received):
                raise MalformedError
            self._scanned = len(received)
            if received:
                self._start_head_timer()
            return False
        head = bytes(received[: end + len(HEAD_END)])
        del received[: len(head)]
        self._scanned = 0
        self._cancel_head_timer()
        lines = head.count(CRLF)
        # With line ends of one kind and no folded lines, llhttp can see the end of the head here only.
        one_kind = lines == head.count(b"\n") == head.count(b"\r")
        folded = b"\r\n " in head or b"\r\n\t" in head
        if not one_kind or folded or len(head) > MAX_HEAD_BYTES or lines - 2 > MAX_FIELDS:
            raise MalformedError
        # A new parser for each head: this one never hears of the body.
        self.parser = httptools.HttpRequestParser(self)
        try:
            self.parser.feed_data(head)
        except httptools.HttpParserUpgrade:
            if self.parser.get_method() == b"CONNECT":
                raise MalformedError from None
        except httptools.HttpParserError:
            raise MalformedError from None
        if self._body is None:
            self._end_message()
        return True

    def _end_message(self) -> None:
        self._body = None
        super().on_message_complete()

    def _start_head_timer(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_timeout_s, self.transport.close)

    def _cancel_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def send_400_response(self, msg: str) -> None:
        """Answer 400 and close the connection; an answer that is under way is left whole or broken off."""
        del msg
        cycle: RequestResponseCycle | None = self.cycle
        if cycle is None or cycle.response_complete:
            self._answer_malformed()
        elif not cycle.response_started:
            # The body of the request is malformed: the app learns that its caller is gone.
            cycle.disconnected = True
            cycle.message_event.set()
            self._answer_malformed()
        else:
            self.transport.close()

    def _answer_malformed(self) -> None:
        # Behind an answer this runs in that request's context; the refusal would be a part of its trace.
        task = self.loop.create_task(self._refuse(), context=Context())
        task.add_done_callback(self.tasks.discard)
        self.tasks.add(task)

    async def _refuse(self) -> None:
        scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": self.asgi_version, "spec_version": "2.3"},
            "http_version": "1.1",
            "server": self.server,
            "client": self.client,
            "scheme": self.scheme,
            "method": "_OTHER",
            "root_path": self.root_path,
            "path": "",
            "raw_path": b"",
            "query_string": b"",
            "headers": [],
            "state": self.app_state.copy(),
            MALFORMED: True,
        }
        await self.app(scope, _receive_disconnect, self._write)
        self.transport.close()

    async def _write(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = [*self.server_state.default_headers, *message["headers"], (b"connection", b"close")]
            lines = [name + b": " + value + b"\r\n" for name, value in headers]
            self.transport.write(b"".join([STATUS_LINE[message["status"]], *lines, b"\r\n"]))
        else:
            self.transport.write(message.get("body", b""))


async def _receive_disconnect() -> Message:
    return {"type": "http.disconnect"}
