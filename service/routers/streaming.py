"""A streamed answer on its way to the caller, in the words of a protocol."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.errors import CallerLeftError, ServiceError, ShuttingDownError
from service.middleware.errors import record_late_error
from service.upstream.messages import Completion
from service.upstream.stream import Relay, StreamEvent, comment
from service.utils.disconnect import cancel_on_disconnect

KEEP_ALIVE = comment("keep-alive")
LAST_WORDS_S = 0.4
"""So long a caller who does not read may hold up the error that ends their stream; less than the drain's own
grace after its limit."""

HEADERS = {
    "Cache-Control": "no-store",
    # Proxies like nginx collect an answer before they pass it on, unless they are told not to.
    "X-Accel-Buffering": "no",
}


class Wire(Protocol):
    """A protocol's words for what can happen to a stream."""

    def piece(self, event: StreamEvent) -> bytes:
        """What the caller gets for a piece of the answer; nothing where the protocol has no word for it."""

    def done(self, completion: Completion) -> bytes:
        """What ends an answer that is whole."""

    def error(self, error: ServiceError) -> bytes:
        """What ends an answer that is not."""


class EventStream(Response):
    """Runs a streamed call and sends its pieces as they come.

    The head goes out with the first piece: what fails before is an error like any other. What fails
    afterwards is said in the protocol's words, and the stream ends in order.

    Args:
        run: Runs the call with what hands a piece on.
        wire: The protocol.
        keep_alive_s: Seconds of silence after which a comment is sent.
    """

    media_type = "text/event-stream"

    def __init__(
        self, run: Callable[[Relay], Awaitable[Completion]], wire: Wire, keep_alive_s: float
    ) -> None:
        super().__init__(headers=HEADERS)
        # Its length is not known, and its only encoding is UTF-8.
        del self.headers["Content-Length"]
        self.headers["Content-Type"] = self.media_type
        self._run = run
        self._wire = wire
        self._keep_alive_s = keep_alive_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the whole answer."""
        del scope
        sender = _Sender(send, self, self._keep_alive_s)

        async def relay(event: StreamEvent) -> None:
            await sender.send(self._wire.piece(event))

        try:
            completion = await cancel_on_disconnect(receive, self._run(relay))
        except CallerLeftError as error:
            if not sender.started:
                raise
            record_late_error(error)
        except asyncio.CancelledError:
            # Nobody but the end of this process cancels a request; it goes on its way when that is said.
            if sender.started:
                stopping = ShuttingDownError("This process is stopping, and your request took too long.")
                await sender.say_last(self._wire.error(record_late_error(stopping)))
            raise
        except Exception as error:
            if not sender.started:
                raise
            await sender.say_last(self._wire.error(record_late_error(error)))
        else:
            await sender.end(self._wire.done(completion))
        finally:
            sender.close()


class _Sender:
    """Sends the head with the first piece, and comments while there are none."""

    def __init__(self, send: Send, response: Response, keep_alive_s: float) -> None:
        self._send = send
        self._head = {
            "type": "http.response.start",
            "status": response.status_code,
            "headers": response.raw_headers,
        }
        self._keep_alive_s = keep_alive_s
        self._keeping_alive: asyncio.Task[None] | None = None
        self._sending = False
        self._last_s = time.monotonic()
        self.started = False

    async def send(self, data: bytes) -> None:
        """Send a piece; returns when there is room for the next one."""
        if not self.started:
            self.started = True
            await self._send(self._head)
            self._keeping_alive = asyncio.create_task(self._keep_alive())
        if data:
            self._sending = True
            await self._send({"type": "http.response.body", "body": data, "more_body": True})
            self._sending = False
            self._last_s = time.monotonic()

    async def end(self, data: bytes) -> None:
        """Send the last piece."""
        if not self.started:
            await self.send(b"")
        self.close()
        await self._send({"type": "http.response.body", "body": data, "more_body": False})

    async def say_last(self, data: bytes) -> None:
        """Send the last piece, unless the caller does not read."""
        with suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORDS_S):
                await self.end(data)

    def close(self) -> None:
        """Send no comment any more."""
        if self._keeping_alive is not None:
            self._keeping_alive.cancel()
            self._keeping_alive = None

    async def _keep_alive(self) -> None:
        while True:
            idle_s = time.monotonic() - self._last_s
            # A caller who does not read needs no more to read.
            if idle_s >= self._keep_alive_s and not self._sending:
                await self._send({"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True})
                self._last_s = time.monotonic()
                idle_s = 0.0
            await asyncio.sleep(max(self._keep_alive_s - idle_s, self._keep_alive_s / 10))
