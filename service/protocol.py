"""uvicorn's HTTP protocol, with limits on a request's head and with the service's own answer to invalid HTTP.

uvicorn answers invalid HTTP in plain text, outside the app and without a trace, and never limits the time or
size of a head. The protocol relies on attributes of uvicorn's that are not documented;
``tests/contract/test_vendor_internals.py`` checks them. Bodies are limited by ``middleware.request_limits``.
"""

import asyncio
from typing import Any, ClassVar

from starlette.types import Message
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from service.middleware.request_limits import MALFORMED

MAX_HEAD_BYTES = 65_536


class Protocol(HttpToolsProtocol):
    """Limits the time and size of a request's head, and answers malformed requests through the app."""

    head_timeout_s: ClassVar[float] = 10.0

    _head_timer: asyncio.TimerHandle | None = None
    _head_begun = False
    _head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the time limit of the first head."""
        super().connection_made(transport)
        self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the time limit."""
        self._cancel_head_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse the data, and refuse a head that exceeds ``MAX_HEAD_BYTES``."""
        super().data_received(data)
        if self._head_timer is None:
            return
        self._head_bytes += len(data)
        if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._cancel_head_timer()
            self.send_400_response("")

    def on_message_begin(self) -> None:
        """Start the time limit of a head, unless an answer is still being sent."""
        super().on_message_begin()
        self._head_begun = True
        cycle: RequestResponseCycle | None = self.cycle
        if cycle is None or cycle.response_complete:
            self._start_head_timer()

    def on_headers_complete(self) -> None:
        """Cancel the time limit."""
        self._cancel_head_timer()
        self._head_begun = False
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        """Start the time limit of a pipelined request's head that has begun to arrive."""
        super().on_response_complete()
        if self._head_begun:
            self._start_head_timer()

    def send_400_response(self, msg: str) -> None:
        """Answer invalid HTTP with 400 and close the connection, without damaging an answer in progress."""
        del msg
        cycle: RequestResponseCycle | None = self.cycle
        if cycle is None or cycle.response_complete:
            self._answer_malformed()
        elif not cycle.more_body:
            # The invalid bytes follow a complete request, which gets its answer first.
            cycle.keep_alive = False
        elif not cycle.response_started:
            # The invalid bytes are in the request's own body: end the wait for the rest of it.
            cycle.disconnected = True
            cycle.message_event.set()
            self._answer_malformed()
        else:
            self.transport.close()

    def _start_head_timer(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_timeout_s, self.transport.close)

    def _cancel_head_timer(self) -> None:
        self._head_bytes = 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _answer_malformed(self) -> None:
        task = self.loop.create_task(self._run_app())
        task.add_done_callback(self.tasks.discard)
        self.tasks.add(task)

    async def _run_app(self) -> None:
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
