"""Bounds what a request may bring and take: HTTP only, a body of bounded size and time, a place in flight."""

import asyncio
from collections.abc import Callable

from opentelemetry.metrics import Counter
from starlette.datastructures import MutableHeaders
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.config.settings import Settings
from service.errors import BadRequestError, OverloadedError, PayloadTooLargeError, RequestTimeoutError
from service.middleware.errors import answer
from service.telemetry.instruments import Instruments
from service.telemetry.providers import PROBES

ARRIVING_PER_PLACE = 4
"""Bodies that may be on their way for each place in flight. They are counted apart: a place is for a request
whose body is there, or strangers who promise bodies and send none would take the places of callers."""


class InFlight:
    """The places, and the bodies on their way to one."""

    def __init__(self, places: int, instruments: Instruments) -> None:
        self.places = places
        self.taken = 0
        self.arriving = 0
        self.gauge = instruments.requests_in_flight
        self.rejected = instruments.requests_rejected

    def refuse(self) -> OverloadedError:
        """Count a rejection, and make its error."""
        self.rejected.add(1, {"reason": "overloaded"})
        return OverloadedError()


class Place:
    """One request's claim: first as a body on its way, then, with ``take``, as a request in flight."""

    def __init__(self, all_places: InFlight) -> None:
        self._all = all_places
        if all_places.arriving >= ARRIVING_PER_PLACE * all_places.places:
            raise all_places.refuse()
        all_places.arriving += 1
        self._taken = False

    def take(self) -> None:
        """Go from arriving to in flight; ``OverloadedError`` when there is no place."""
        if self._taken:
            return
        if self._all.taken >= self._all.places:
            raise self._all.refuse()
        self._all.arriving -= 1
        self._all.taken += 1
        self._all.gauge.add(1)
        self._taken = True

    def give_back(self) -> None:
        """Count no more, whatever it was."""
        if self._taken:
            self._all.taken -= 1
            self._all.gauge.add(-1)
        else:
            self._all.arriving -= 1


MALFORMED = "llmops.malformed"
"""Set in the scope by our HTTP protocol when what came in is no HTTP request."""

LINGER_BYTES = 262_144
LINGER_S = 1.0
"""So much of a refused body, and for so long, is still read after the answer: a connection closed with unread
data in it is reset, and a caller who is still sending would never see why (RFC 9112, section 9.6)."""


class RequestLimitsMiddleware:
    """Turns away what is malformed, too much at once, too large, or too slow in coming.

    Health routes are never turned away. Starlette's own middleware counts a body as it arrives; it would
    answer a declared size with a body of its own shape, so that is looked at here.

    Args:
        app: What is protected.
        settings: The limits.
        instruments: Where requests in flight and rejections are counted.
    """

    def __init__(self, app: ASGIApp, settings: Settings, instruments: Instruments) -> None:
        self._unlimited = app
        self._app = RequestBodyLimitMiddleware(app, settings.max_body_bytes)
        self._max_body_bytes = settings.max_body_bytes
        self._body_timeout_s = settings.request_body_timeout_s
        self._in_flight = InFlight(settings.max_in_flight, instruments)
        self._rejected = instruments.requests_rejected

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] != "http":
            await self._unlimited(scope, receive, send)
            return
        declared, has_body = _body_of(scope)
        if scope["path"] in PROBES:
            # No probe reads a body; where one comes all the same, the connection ends with the answer.
            unread = has_body
            lingering = _LingeringSend(receive, send, self._rejected, lambda: unread)
            await self._unlimited(scope, receive, lingering)
            return
        if MALFORMED in scope:
            raise BadRequestError("This is not a valid HTTP request.")
        place = Place(self._in_flight)
        try:
            in_time = _TimedReceive(receive, self._body_timeout_s, place)
            lingering = _LingeringSend(
                receive, send, self._rejected, lambda: has_body and not in_time.complete
            )
            if not has_body:
                place.take()
            if declared > self._max_body_bytes:
                await self._refuse(declared, scope, receive, lingering)
            else:
                await self._app(scope, in_time, lingering)
        finally:
            place.give_back()

    async def _refuse(self, declared: int, scope: Scope, receive: Receive, send: Send) -> None:
        error = PayloadTooLargeError(
            f"The request's body is {declared} bytes long; the limit is {self._max_body_bytes}."
        )
        await answer(error, scope)(scope, receive, send)


def _body_of(scope: Scope) -> tuple[int, bool]:
    """The size that the request's body is declared to have, 0 for none; and whether there is a body."""
    declared, chunked = b"0", False
    for name, value in scope["headers"]:
        if name == b"content-length":
            declared = value
        elif name == b"transfer-encoding":
            chunked = True
    return int(declared) if declared.isdigit() else 0, chunked or declared != b"0"


class _TimedReceive:
    """An ASGI receive whose body must be complete in time; what follows the body may take for ever.

    When the body is complete the request takes its place in flight.
    """

    def __init__(self, receive: Receive, limit_s: float, place: Place) -> None:
        self._receive = receive
        self._place = place
        self._until = asyncio.get_running_loop().time() + limit_s
        self.complete = False

    async def __call__(self) -> Message:
        if self.complete:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._until):
                message = await self._receive()
        except TimeoutError:
            raise RequestTimeoutError from None
        self.complete = not message.get("more_body", False)
        if self.complete and message["type"] == "http.request":
            self._place.take()
        return message


class _LingeringSend:
    """An ASGI send for an answer that may come before the body was read.

    Such an answer closes the connection, or the rest of the body would be read for ever; and a little of it
    is read after the answer, so that the caller gets to see why. A 413 is counted.
    """

    def __init__(self, receive: Receive, send: Send, rejected: Counter, unread: Callable[[], bool]) -> None:
        self._receive = receive
        self._send = send
        self._rejected = rejected
        self._unread = unread
        self._lingers = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            if message["status"] == PayloadTooLargeError.status:
                self._rejected.add(1, {"reason": "too_large"})
            self._lingers = self._unread()
            if self._lingers:
                MutableHeaders(scope=message)["Connection"] = "close"
        elif self._lingers and not message.get("more_body", False):
            await self._send({**message, "more_body": True})
            await self._read_a_little()
            message = {"type": "http.response.body", "body": b""}
        await self._send(message)

    async def _read_a_little(self) -> None:
        seen = 0
        try:
            async with asyncio.timeout(LINGER_S):
                while seen < LINGER_BYTES:
                    message = await self._receive()
                    if not message.get("more_body", False):
                        return
                    seen += len(message.get("body", b""))
        except TimeoutError:
            return
