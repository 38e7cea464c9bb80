"""uvicorn's HTTP protocol, with this service's answer to bytes that are no HTTP request."""

import asyncio
from typing import Any, ClassVar

from starlette.types import Message
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from service.middleware.request_limits import MALFORMED

MAX_HEAD_BYTES = 65_536


class Protocol(HttpToolsProtocol):
    """Answers a malformed request through the app, so that it gets an id, a span, and the errors' shape.

    uvicorn's own answer is plain text that no trace knows of. And a caller who does not finish the head of a
    request in time is left, which uvicorn never does; bodies have a limit of their own further in.
    """

    head_timeout_s: ClassVar[float] = 10.0

    _head_timer: asyncio.TimerHandle | None = None
    _head_begun = False
    _head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first request's head."""
        super().connection_made(transport)
        self._expect_head()

    def on_message_begin(self) -> None:
        """Wait for the rest of a head that has begun."""
        super().on_message_begin()
        self._head_begun = True
        cycle: RequestResponseCycle | None = self.cycle
        # While an answer is being made, the next head has time.
        if cycle is None or cycle.response_complete:
            self._expect_head()

    def on_headers_complete(self) -> None:
        """Wait no more."""
        self._stop_expecting()
        self._head_begun = False
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        self._stop_expecting()
        super().connection_lost(exc)

    def _expect_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_timeout_s, self.transport.close)

    def _stop_expecting(self) -> None:
        self._head_bytes = 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def data_received(self, data: bytes) -> None:
        """Read on, but no head that is larger than anybody's."""
        super().data_received(data)
        if self._head_timer is None:
            return
        self._head_bytes += len(data)
        if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._stop_expecting()
            self.send_400_response("")

    def on_response_complete(self) -> None:
        """Wait for the next request's head, where it has begun already."""
        super().on_response_complete()
        if self._head_begun:
            self._expect_head()

    def send_400_response(self, msg: str) -> None:
        """Answer 400 and close the connection; an answer that is under way is not spoilt."""
        del msg
        cycle: RequestResponseCycle | None = self.cycle
        if cycle is None or cycle.response_complete:
            self._answer_400()
        elif not cycle.more_body:
            # The garbage came behind a whole request, which gets its answer first.
            cycle.keep_alive = False
        elif not cycle.response_started:
            # The request's own body is garbage: whoever waits for the rest of it learns that nobody is there.
            cycle.disconnected = True
            cycle.message_event.set()
            self._answer_400()
        else:
            self.transport.close()

    def _answer_400(self) -> None:
        task = self.loop.create_task(self._refuse())
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
        await self.app(scope, _nothing_more, self._write)
        self.transport.close()

    async def _write(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = [*self.server_state.default_headers, *message["headers"], (b"connection", b"close")]
            lines = [name + b": " + value + b"\r\n" for name, value in headers]
            self.transport.write(b"".join([STATUS_LINE[message["status"]], *lines, b"\r\n"]))
        else:
            self.transport.write(message.get("body", b""))


async def _nothing_more() -> Message:
    return {"type": "http.disconnect"}
