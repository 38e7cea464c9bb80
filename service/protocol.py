"""uvicorn's HTTP protocol, with this service's answer to bytes that are no HTTP request."""

import asyncio
from typing import Any, ClassVar

from starlette.types import Message
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from service.middleware.request_limits import MALFORMED


class Protocol(HttpToolsProtocol):
    """Answers a malformed request through the app, so that it gets an id, a span, and the errors' shape.

    uvicorn's own answer is plain text that no trace knows of. And a caller who does not finish the head of a
    request in time is left, which uvicorn never does; bodies have a limit of their own further in.
    """

    head_timeout_s: ClassVar[float] = 10.0

    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first request's head."""
        super().connection_made(transport)
        self._expect_head()

    def on_message_begin(self) -> None:
        """Wait for the rest of a head that has begun."""
        super().on_message_begin()
        self._expect_head()

    def on_headers_complete(self) -> None:
        """Wait no more."""
        self._stop_expecting()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        self._stop_expecting()
        super().connection_lost(exc)

    def _expect_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_timeout_s, self.transport.close)

    def _stop_expecting(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def send_400_response(self, msg: str) -> None:
        """Answer 400 and close the connection; when an answer is under way already, only close."""
        del msg
        cycle: RequestResponseCycle | None = self.cycle
        if cycle is not None and not cycle.response_complete:
            self.transport.close()
            return
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
