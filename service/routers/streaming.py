"""A streamed answer on its way to the caller: server-sent events in a protocol's format, or bytes."""

import asyncio
import math
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, suppress
from typing import Final, Protocol

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from service.dependencies import StreamTimes
from service.errors import CallerLeftError, ServiceError, ShuttingDownError
from service.middleware.errors import record_late_error
from service.services.call_report import CallOutcome
from service.upstream.messages import Completion
from service.upstream.stream import StreamEvent, comment
from service.upstream.upload import Upload
from service.utils.disconnect import abort_connection, cancel_on_disconnect, cut_connection

EVENTS: Final = "text/event-stream"
KEEP_ALIVE: Final = comment("keep-alive")
FINAL_EVENT_TIMEOUT_S: Final = 0.4
"""Seconds that a client which does not read may delay the error event that ends its stream; less than the
drain's own grace after its limit."""

HEADERS: Final = (
    (b"cache-control", b"no-store"),
    # Proxies such as nginx buffer an answer unless they are told not to.
    (b"x-accel-buffering", b"no"),
    (b"content-type", EVENTS.encode()),
)


class StreamFormat(Protocol):
    """How a protocol writes what can happen to a stream."""

    def piece(self, event: StreamEvent) -> bytes:
        """The bytes for an event of the upstream; empty where the protocol has none for it."""

    def done(self, completion: Completion, outcome: CallOutcome) -> bytes:
        """The bytes that end a complete answer."""

    def error(self, error: ServiceError) -> bytes:
        """The bytes that end an answer which failed."""


class StreamedAnswer(Protocol):
    """A streamed answer, to be iterated once; ``completion`` and ``outcome`` are there when it has ended."""

    @property
    def content_type(self) -> str:
        """The media type of the answer."""

    @property
    def completion(self) -> Completion:
        """What is known of the answer."""

    @property
    def outcome(self) -> CallOutcome:
        """How the call ended."""

    def __aiter__(self) -> AsyncIterator[StreamEvent]: ...


class EventStream(Response):
    """Runs a streamed call and sends its pieces as they come.

    The head is sent with the first piece: what fails before is an error like any other. What fails afterwards
    is an error event of the protocol, and the HTTP body ends in order. An answer that is no stream of events,
    but bytes of its own type, has no place for an error: there the HTTP body does not end in order.

    Args:
        stream: The call, not begun yet.
        stream_format: The protocol.
        times: When a comment is sent, and when a caller who does not read is given up.
        upload: The request's body, where it is still arriving.
    """

    media_type = EVENTS

    def __init__(
        self,
        stream: AbstractAsyncContextManager[StreamedAnswer],
        stream_format: StreamFormat,
        times: StreamTimes,
        *,
        upload: Upload | None = None,
    ) -> None:
        # Not by ``Response``'s own: the length is not known, and the encoding is always UTF-8.
        self.status_code, self.background, self.body = 200, None, b""
        self.raw_headers = [*HEADERS]
        self._stream = stream
        self._format = stream_format
        self._times = times
        self._upload = upload

    @property
    def _is_events(self) -> bool:
        return self.headers["Content-Type"] == self.media_type

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the whole answer."""
        sender = _Sender(send, self, self._times)
        if self._upload is not None:
            receive = self._upload.receive_after(receive)
        try:
            done = await cancel_on_disconnect(receive, self._send_pieces(sender))
        except CallerLeftError as error:
            if not sender.started:
                raise
            record_late_error(error)
            # One who does not read would keep what is written, and the connection, for ever.
            abort_connection(scope)
        except asyncio.CancelledError:
            # Only the end of the process cancels a request. The caller is told, and the cancellation goes on.
            if sender.started:
                stopping = ShuttingDownError("This process is stopping, and your request took too long.")
                await self._end_failed(sender, scope, stopping)
            raise
        except Exception as error:
            if not sender.started:
                raise
            await self._end_failed(sender, scope, error)
        else:
            await sender.end(done)
        finally:
            sender.close()

    async def _end_failed(self, sender: "_Sender", scope: Scope, error: Exception) -> None:
        """End an answer that has begun and failed, in the way that its type has for it."""
        found = record_late_error(error)
        if self._is_events:
            await sender.end_soon(b"" if found.told else self._format.error(found))
        else:
            cut_connection(scope)

    async def _send_pieces(self, sender: "_Sender") -> bytes:
        """Send every piece; returns what ends the answer, when the call is over and recorded."""
        async with self._stream as stream:
            if stream.content_type != self.media_type:
                self.headers["Content-Type"] = stream.content_type
                sender.keep_alive_s = math.inf
            async for event in stream:
                await sender.send(self._format.piece(event))
        return self._format.done(stream.completion, stream.outcome)


class _Sender:
    """Sends the head with the first piece, and a comment after each interval of silence."""

    def __init__(self, send: Send, response: Response, times: StreamTimes) -> None:
        self._send_unlimited = send
        self._write_timeout_s = times.write_timeout_s
        self._response = response
        self.keep_alive_s = times.keep_alive_s
        self._keeping_alive: asyncio.Task[None] | None = None
        self._sending = False
        self._last_s = time.monotonic()
        self.started = False

    async def send(self, data: bytes) -> None:
        """Send a piece; returns when the transport accepts more (backpressure)."""
        if not self.started:
            self.started = True
            await self._send(
                {
                    "type": "http.response.start",
                    "status": self._response.status_code,
                    "headers": self._response.raw_headers,
                }
            )
            if self.keep_alive_s < math.inf:
                self._keeping_alive = asyncio.create_task(self._keep_alive())
        if data:
            self._sending = True
            await self._send({"type": "http.response.body", "body": data, "more_body": True})
            self._sending = False
            self._last_s = time.monotonic()

    async def _send(self, message: Message) -> None:
        """Send a message; raises ``CallerLeftError`` where the caller takes nothing for too long."""
        try:
            async with asyncio.timeout(self._write_timeout_s) as limit:
                await self._send_unlimited(message)
        except TimeoutError:
            if limit.expired():
                raise CallerLeftError("The caller did not read its answer.") from None
            raise

    async def end(self, data: bytes) -> None:
        """Send the last piece."""
        if not self.started:
            await self.send(b"")
        self.close()
        await self._send({"type": "http.response.body", "body": data, "more_body": False})

    async def end_soon(self, data: bytes) -> None:
        """Send the last piece; give up on a client that does not read."""
        with suppress(TimeoutError):
            async with asyncio.timeout(FINAL_EVENT_TIMEOUT_S):
                await self.end(data)

    def close(self) -> None:
        """Stop sending comments."""
        if self._keeping_alive is not None:
            self._keeping_alive.cancel()
            self._keeping_alive = None

    async def _keep_alive(self) -> None:
        # What the next piece meets as well ends the stream there.
        with suppress(CallerLeftError):
            await self._send_comments()

    async def _send_comments(self) -> None:
        while True:
            idle_s = time.monotonic() - self._last_s
            # A client that does not read gets no comments either.
            if idle_s >= self.keep_alive_s and not self._sending:
                await self._send({"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True})
                self._last_s = time.monotonic()
                idle_s = 0.0
            await asyncio.sleep(max(self.keep_alive_s - idle_s, self.keep_alive_s / 10))
