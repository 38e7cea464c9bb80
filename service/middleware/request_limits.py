"""Limits requests: valid HTTP only, the size and time of a body, and the number in all and per caller.

A declared size over the limit is refused at once, a chunked body is counted as it arrives. The caller is
known before a byte of a body is read, so that nobody can use up what belongs to others: a caller has a share
of the places and of the memory for bodies, and strangers have none of them. Requests whose body is still
arriving are bounded separately from requests in flight: otherwise clients that announce a body and never send
it could use up the capacity.
"""

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address
from typing import Final

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.config.settings import Settings
from service.dependencies import CALLER, identify, services_of
from service.errors import (
    AuthenticationError,
    BadRequestError,
    OverloadedError,
    PayloadTooLargeError,
    RequestTimeoutError,
    ServiceError,
)
from service.middleware.errors import OPENAI_PREFIX, error_response, is_openai_path
from service.telemetry.instruments import Instruments
from service.telemetry.providers import PROBES
from service.upstream.operations import OPERATIONS

MALFORMED = "llmops.malformed"
"""Key that ``service.protocol`` sets in the scope of a request that is not valid HTTP."""

LOGIN: Final = "/auth/login"
UPLOADS: Final = frozenset(
    f"{OPENAI_PREFIX}{operation.path}"
    for operation in OPERATIONS.values()
    if operation.request_body == "form"
)
"""The routes whose body is passed on as it arrives."""

BODY: Final = "llmops.body"
"""Key in the scope of a request to one of them, for ``pass_body_on``."""

LOGIN_BODY_BYTES: Final = 8_192
"""Largest body of a sign-in: a name of 256 and a password of 1,024 characters, with room for escapes."""

WITHOUT_BODY: Final = frozenset({"GET", "HEAD", "OPTIONS", "DELETE"})
"""Methods whose body no route reads; such a request is complete with its head."""

ARRIVING_PER_IN_FLIGHT: Final = 4
"""Maximum number of requests whose body is arriving, for each request that may be in flight."""

SHORT_PER_IN_FLIGHT: Final = 0.25
MIN_SHORT: Final = 16
"""Places for requests without a model call, beside those of MAX_IN_FLIGHT: sign-in, lists, statistics."""

STRANGERS_PER_ADDRESS: Final = 16
STRANGERS: Final = 256
"""How many requests without a valid token there may be at the same time, from one address and in all;
sign-ins, sign-ins from addresses that have signed in before, and all others are counted apart."""

BODY_BYTES_PER_S: Final = 1_048_576
"""What has arrived of a body prolongs its time limit: a large one takes longer."""

LARGEST_BODIES: Final = 8
"""Memory for the bodies of all requests, in bodies of the largest permitted size; a caller has half of it."""

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
        self._sign_in = _BodyLimit(min(LOGIN_BODY_BYTES, settings.max_body_bytes), "of a sign-in")
        self._own = _BodyLimit(settings.max_body_bytes, "MAX_BODY_BYTES")
        self._v1 = _BodyLimit(settings.max_v1_body_bytes, "MAX_V1_BODY_BYTES")
        self._upload = _BodyLimit(settings.max_upload_bytes, "MAX_UPLOAD_BYTES")
        held = _BodyLimit(
            settings.max_v1_body_bytes, "MAX_V1_BODY_BYTES for what stands before the field model"
        )
        self._read_first = _Arriving(settings.request_body_timeout_s, None)
        self._passed_on = _Arriving(settings.request_body_timeout_s, held)
        self._capacity = _Capacity(settings, instruments)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        arriving = self._passed_on if scope["path"] in UPLOADS else self._read_first
        exchange = _Exchange(scope, receive, send, self._capacity, arriving, self._limit(scope))
        if scope["path"] in PROBES:
            await self._app(scope, receive, exchange.send)
            return
        if MALFORMED in scope:
            raise BadRequestError("This is not a valid HTTP request.")
        try:
            await exchange.arrive()
        except ServiceError as error:
            exchange.leave()
            if isinstance(error, PayloadTooLargeError):
                # Refused for what it announces; its caller may ask later what became of it.
                with suppress(ServiceError):
                    await identify(scope)
            await error_response(error, scope)(scope, receive, exchange.send)
            return
        try:
            await self._app(scope, exchange.receive, exchange.send)
        finally:
            exchange.leave()

    def _limit(self, scope: Scope) -> "_BodyLimit":
        if scope["path"] == LOGIN:
            return self._sign_in
        if scope["path"] in UPLOADS:
            return self._upload
        return self._v1 if is_openai_path(scope) else self._own


@dataclass(frozen=True, slots=True)
class _BodyLimit:
    """The largest body of some routes.

    Args:
        max_bytes: The limit.
        name: Names the limit in the refusal; a setting's name where it is one.
    """

    max_bytes: int
    name: str

    def check(self, size: int) -> None:
        """Raise ``PayloadTooLargeError`` for a body of so many bytes, declared or received so far."""
        if size > self.max_bytes:
            raise PayloadTooLargeError(
                f"The request's body is too large; the limit {self.name} is {self.max_bytes:,} bytes."
            )


class _Capacity:
    """The numbers of requests in flight and of requests whose body is arriving, in all and by caller."""

    def __init__(self, settings: Settings, instruments: Instruments) -> None:
        self.calls = _Places(settings.max_in_flight, settings.in_flight_per_user)
        short = max(MIN_SHORT, int(settings.max_in_flight * SHORT_PER_IN_FLIGHT))
        share = settings.in_flight_per_user / settings.max_in_flight
        self.short = _Places(short, max(1, int(short * share)))
        self.arriving = _Places(
            settings.max_in_flight * ARRIVING_PER_IN_FLIGHT,
            settings.in_flight_per_user * ARRIVING_PER_IN_FLIGHT,
        )
        largest = max(settings.max_body_bytes, settings.max_v1_body_bytes)
        self.body_bytes = _Places(LARGEST_BODIES * largest, LARGEST_BODIES // 2 * largest)
        self.signing_in = _Places(STRANGERS, STRANGERS_PER_ADDRESS)
        self.signing_in_again = _Places(STRANGERS, STRANGERS_PER_ADDRESS)
        self.public = _Places(STRANGERS, STRANGERS_PER_ADDRESS)
        self.gauge = instruments.requests_in_flight
        self.rejected = instruments.requests_rejected


class _Places:
    """A number of places (or of bytes), of which each holder can have a smaller number.

    Args:
        total: Places in all.
        each: Places that one holder can have.
    """

    def __init__(self, total: int, each: int) -> None:
        self._total = total
        self._each = each
        self._taken = 0
        self._by_holder: dict[str, int] = {}

    def take(self, holder: str, number: int = 1) -> bool:
        """Take places; False where so many are not left, for all or for this holder."""
        held = self._by_holder.get(holder, 0) + number
        if self._taken + number > self._total or held > self._each:
            return False
        self._taken += number
        self._by_holder[holder] = held
        return True

    def give_back(self, holder: str, number: int = 1) -> None:
        """Give places back."""
        self._taken -= number
        left = self._by_holder[holder] - number
        if left:
            self._by_holder[holder] = left
        else:
            del self._by_holder[holder]


def address_of(scope: Scope) -> str:
    """The client's address; of IPv6 the network of 64 bits, all of which one client can have."""
    host: str = scope["client"][0] if scope.get("client") else ""
    try:
        address = ip_address(host)
    except ValueError:
        return host
    if isinstance(address, IPv6Address):
        mapped = address.ipv4_mapped
        return str(mapped) if mapped is not None else f"{IPv6Address(int(address) >> 64 << 64)}/64"
    return host


def pass_body_on(scope: Scope) -> None:
    """Let the rest of a request's body go on as it arrives; it belongs to a route of ``UPLOADS``.

    Raises:
        OverloadedError: There is no place for the request.
    """
    scope[BODY].pass_on()


@dataclass(frozen=True, slots=True)
class _Arriving:
    """Limits of a body while it arrives.

    Args:
        timeout_s: Seconds, without those that its size adds.
        held: Of a body that is passed on as it arrives: the limit of what is held before; else None.
    """

    timeout_s: float
    held: _BodyLimit | None


class _Exchange:
    """The ASGI ``receive`` and ``send`` of one request, and the places that it holds.

    ``receive`` limits the time of the body, but not of the messages after it, and admits the request when its
    body is complete. ``send`` closes the connection after an answer that is sent before the body was read,
    and counts 413 answers.

    Args:
        scope: The request's scope, whose header fields announce the body.
        receive: The server's ``receive``.
        send: The server's ``send``.
        capacity: Where the request is counted.
        arriving: Limits of the body while it arrives.
        limit: Its largest size.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - what one request is made of
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        capacity: _Capacity,
        arriving: _Arriving,
        limit: _BodyLimit,
    ) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._capacity = capacity
        self._body_until_s = asyncio.get_running_loop().time() + arriving.timeout_s
        self._held_limit = arriving.held
        self._limit = limit
        self._passed_on_s: float | None = None
        self._closes = False
        self._holder = ""
        self._place: _Places | None = None
        self._in_flight = False
        self._received_bytes = 0
        self._held_bytes = 0
        length, chunked = b"0", False
        for name, value in scope["headers"]:
            if name == b"content-length":
                length = value
            elif name == b"transfer-encoding":
                chunked = True
        self.declared_bytes = int(length) if length.isdigit() else 0
        self.body_pending = chunked or length != b"0"

    async def arrive(self) -> None:
        """Find out who is calling, and count the request: as arriving while its body is, else as in flight.

        Raises:
            PayloadTooLargeError: The announced body is larger than the limit.
            AuthenticationError: The request has a body, no valid token, and does not sign in.
            OverloadedError: Too many requests of the caller, or in all.
        """
        self._limit.check(self.declared_bytes)
        scope, capacity = self._scope, self._capacity
        caller = await identify(scope)
        user = caller.username if caller is not None else None
        self._holder = f"user {user}" if user is not None else f"address {address_of(scope)}"
        if scope["method"] in WITHOUT_BODY or not self.body_pending:
            self._admit(capacity.short if user is not None else capacity.public)
        elif scope["path"] == LOGIN:
            known = services_of(scope).auth.has_signed_in(address_of(scope))
            self._take(capacity.signing_in_again if known else capacity.signing_in)
        elif user is None:
            # Says why, where something was sent.
            raise scope.get(CALLER) or AuthenticationError
        else:
            self._take(capacity.arriving)
        if self._held_limit is None:
            self._hold(self.declared_bytes)
        else:
            scope[BODY] = self

    def _hold(self, size: int) -> None:
        """Count the body's bytes, which stay in memory until the request is over."""
        more = size - self._held_bytes
        # Sign-ins are small and few, and must get in when callers hold all of the memory.
        if more <= 0 or self._scope["path"] == LOGIN:
            return
        if not self._capacity.body_bytes.take(self._holder, more):
            self._capacity.rejected.add(1, {"reason": "overloaded"})
            raise OverloadedError
        self._held_bytes = size

    def _take(self, places: _Places) -> None:
        if not places.take(self._holder):
            self._capacity.rejected.add(1, {"reason": "overloaded"})
            raise OverloadedError
        self._place = places

    def _admit(self, places: _Places) -> None:
        """Count the request as in flight; raises ``OverloadedError`` where it is one too many."""
        self._give_back()
        self._take(places)
        self._in_flight = True
        self._capacity.gauge.add(1)

    def pass_on(self) -> None:
        """Count the request as in flight while its body is arriving, and the rest of it as not held.

        Raises:
            OverloadedError: There is no place for the request.
        """
        self._passed_on_s = asyncio.get_running_loop().time()
        if not self._in_flight:
            self._admit(self._capacity.calls)

    def _give_back(self) -> None:
        if self._place is not None:
            self._place.give_back(self._holder)
            self._place = None

    def leave(self) -> None:
        """Give back the request's place, and its share of the memory for bodies."""
        self._give_back()
        if self._held_bytes:
            self._capacity.body_bytes.give_back(self._holder, self._held_bytes)
            self._held_bytes = 0
        if self._in_flight:
            self._in_flight = False
            self._capacity.gauge.add(-1)

    async def receive(self) -> Message:
        """Receive a message.

        Raises:
            RequestTimeoutError: The body takes too long.
            PayloadTooLargeError: The body is larger than the limit.
            OverloadedError: There is no memory left for it, or no place for the request.
        """
        if not self.body_pending:
            return await self._receive()
        now = asyncio.get_running_loop().time
        if self._passed_on_s is not None:
            # The upstream has taken its time over what has arrived, which is not the caller's.
            self._body_until_s += now() - self._passed_on_s
        elif self._held_limit is not None:
            # Not after a message: the first ones may be larger, and hold what lets the body go on.
            self._held_limit.check(self._received_bytes)
        try:
            async with asyncio.timeout_at(self._body_until_s):
                message = await self._receive()
        except TimeoutError:
            raise RequestTimeoutError from None
        arrived = len(message.get("body", b""))
        self._received_bytes += arrived
        self._body_until_s += arrived / BODY_BYTES_PER_S
        self._limit.check(self._received_bytes)
        if self._passed_on_s is not None:
            self._passed_on_s = now()
        else:
            self._hold(self._received_bytes)
        self.body_pending = message.get("more_body", False)
        if not self.body_pending and message["type"] == "http.request" and not self._in_flight:
            # Sign-ins have a queue of their own, behind the limit of those that may arrive.
            if self._scope["path"] != LOGIN:
                self._admit(self._capacity.calls)
            else:
                self._in_flight = True
                self._capacity.gauge.add(1)
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
