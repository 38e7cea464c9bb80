"""Limits requests: valid HTTP only, the size and time of a body, and the number of requests in flight.

A declared size over the limit is refused here; a chunked body is counted by Starlette's middleware as it
arrives. Requests whose body is still arriving are bounded separately from requests in flight: otherwise
clients that announce a body and never send it could use up the capacity.
"""

import asyncio

from starlette.datastructures import MutableHeaders
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.config.settings import Settings
from service.errors import BadRequestError, OverloadedError, PayloadTooLargeError, RequestTimeoutError
from service.middleware.errors import error_response
from service.telemetry.instruments import Instruments
from service.telemetry.providers import PROBES

MALFORMED = "llmops.malformed"
"""Key that ``service.protocol`` sets in the scope of a request that is not valid HTTP."""

ARRIVING_PER_IN_FLIGHT = 4
"""Maximum number of requests whose body is arriving, for each request that may be in flight."""

LINGER_BYTES = 262_144
LINGER_S = 1.0
"""Limits of the lingering close: how much of a refused body is still read after the answer, and for how long.
Closing a connection with unread data resets it, and the client may then lose the answer (RFC 9112, 9.6)."""


class RequestLimitsMiddleware:
    """Refuses requests that are malformed, too many, too large or too slow. Health routes are never refused.

    Args:
        app: The next ASGI app.
        settings: The limits.
        instruments: Counts requests in flight and rejections.
    """

    def __init__(self, app: ASGIApp, settings: Settings, instruments: Instruments) -> None:
        self._app = app
        self._size_limited_app = RequestBodyLimitMiddleware(app, settings.max_body_bytes)
        self._max_body_bytes = settings.max_body_bytes
        self._body_timeout_s = settings.request_body_timeout_s
        self._capacity = _Capacity(settings.max_in_flight, instruments)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        capacity = self._capacity
        exchange = _Exchange(scope, receive, send, capacity, self._body_timeout_s)
        if scope["path"] in PROBES:
            await self._app(scope, receive, exchange.send)
            return
        if MALFORMED in scope:
            raise BadRequestError("This is not a valid HTTP request.")
        if capacity.arriving >= ARRIVING_PER_IN_FLIGHT * capacity.max_in_flight:
            capacity.rejected.add(1, {"reason": "overloaded"})
            raise OverloadedError
        capacity.arriving += 1
        try:
            if not exchange.body_pending:
                exchange.admit()
            if exchange.declared_bytes > self._max_body_bytes:
                error = PayloadTooLargeError(
                    f"The request's body is {exchange.declared_bytes} bytes long; "
                    f"the limit is {self._max_body_bytes}."
                )
                # Starlette's middleware would answer a declared size in a format of its own.
                await error_response(error, scope)(scope, receive, exchange.send)
            else:
                await self._size_limited_app(scope, exchange.receive, exchange.send)
        finally:
            if exchange.admitted:
                capacity.in_flight -= 1
                capacity.gauge.add(-1)
            else:
                capacity.arriving -= 1


class _Capacity:
    """The numbers of requests in flight and of requests whose body is arriving."""

    def __init__(self, max_in_flight: int, instruments: Instruments) -> None:
        self.max_in_flight = max_in_flight
        self.in_flight = 0
        self.arriving = 0
        self.gauge = instruments.requests_in_flight
        self.rejected = instruments.requests_rejected


class _Exchange:
    """The ASGI ``receive`` and ``send`` of one request.

    ``receive`` limits the time of the body, but not of the messages after it, and admits the request when its
    body is complete. ``send`` closes the connection after an answer that is sent before the body was read,
    and counts 413 answers.

    Args:
        scope: The request's scope, whose header fields announce the body.
        receive: The server's ``receive``.
        send: The server's ``send``.
        capacity: Where the request is counted.
        body_timeout_s: Time limit of the body.
    """

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, capacity: _Capacity, body_timeout_s: float
    ) -> None:
        self._receive = receive
        self._send = send
        self._capacity = capacity
        self._body_until_s = asyncio.get_running_loop().time() + body_timeout_s
        self._closes = False
        self.admitted = False
        length, chunked = b"0", False
        for name, value in scope["headers"]:
            if name == b"content-length":
                length = value
            elif name == b"transfer-encoding":
                chunked = True
        self.declared_bytes = int(length) if length.isdigit() else 0
        self.body_pending = chunked or length != b"0"

    def admit(self) -> None:
        """Count a request whose body is complete as in flight.

        Raises:
            OverloadedError: Too many requests are in flight.
        """
        capacity = self._capacity
        if capacity.in_flight >= capacity.max_in_flight:
            capacity.rejected.add(1, {"reason": "overloaded"})
            raise OverloadedError
        capacity.arriving -= 1
        capacity.in_flight += 1
        capacity.gauge.add(1)
        self.admitted = True

    async def receive(self) -> Message:
        """Receive a message; raises ``RequestTimeoutError`` where the body takes too long."""
        if not self.body_pending:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._body_until_s):
                message = await self._receive()
        except TimeoutError:
            raise RequestTimeoutError from None
        self.body_pending = message.get("more_body", False)
        if not self.body_pending and message["type"] == "http.request":
            self.admit()
        return message

    async def send(self, message: Message) -> None:
        """Send a message; the last one waits until a part of the unread body has been read."""
        if message["type"] == "http.response.start":
            if message["status"] == PayloadTooLargeError.status:
                self._capacity.rejected.add(1, {"reason": "too_large"})
            self._closes = self.body_pending
            if self._closes:
                MutableHeaders(scope=message)["Connection"] = "close"
        elif self._closes and not message.get("more_body", False):
            await self._send({**message, "more_body": True})
            await self._linger()
            message = {"type": "http.response.body", "body": b""}
        await self._send(message)

    async def _linger(self) -> None:
        read = 0
        try:
            async with asyncio.timeout(LINGER_S):
                while read < LINGER_BYTES:
                    message = await self._receive()
                    if not message.get("more_body", False):
                        return
                    read += len(message.get("body", b""))
        except TimeoutError:
            return
