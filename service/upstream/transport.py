"""HTTP to the upstream, below the SDK: an httpx2 transport over aiohttp's pooled connections.

The SDK has an adapter for aiohttp of its own (``openai[aiohttp]``). It reports a broken connection as a
timeout and does not translate the errors of aiohttp's parser, so this transport takes its place.
"""

import asyncio
import logging
from collections.abc import AsyncIterable, AsyncIterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, NamedTuple, NoReturn
from weakref import WeakKeyDictionary

import aiohttp
import httpx2
from aiohttp.http_exceptions import HttpProcessingError
from yarl import URL

from service.errors import Cause

if TYPE_CHECKING:
    from aiohttp.client_proto import ResponseHandler
    from aiohttp.connector import Connection, SocketFactoryType
    from aiohttp.tracing import Trace

MAX_HEAD_LINE: Final = 65_536
"""The longest line of a response's head, in bytes."""

NO_AUTO_HEADERS: Final = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")
"""The header fields that aiohttp would add to a request that lacks them."""

FIELDS: Final = "llmops_fields"
"""Extension of a request: header fields that are sent beside those of the request.

They are kept out of the request because the instrumentation around the transport decodes all of those."""

ENCODED: Final = "llmops-content-encoding"
"""Stands for the ``Content-Encoding`` of an answer, which httpx2 would decode."""

STAYS_INSIDE: Final = frozenset({"baggage", "tracestate"})
"""Header fields of the caller's trace context that the model's provider has no business with; ``traceparent``
goes on."""

NOT_SENT: Final = STAYS_INSIDE | {"transfer-encoding"}
"""Header fields that are not handed to aiohttp, which decides about chunks itself."""

MAX_CACHED_URLS: Final = 64
KEEP_ALIVE_S: Final = 4.0
"""Idle connections are closed after this time. LiteLLM's server, uvicorn, closes them after 5 s, and a
request that is sent at that moment fails."""

MAX_ERROR_BYTES: Final = 262_144
"""How much is read of an answer with the status of an error: it is parsed whole, which takes its time."""

ERROR_STATUS: Final = 400

CHUNK_BYTES: Final = 65_536
MAX_UNCHUNKED_BYTES: Final = 2**20
"""Larger bodies are written in chunks: aiohttp warns that one large write holds up the event loop."""

AIOHTTP_ERRORS: Final = (aiohttp.ClientError, HttpProcessingError, OSError, RuntimeError, ValueError)
"""What aiohttp raises. ``RuntimeError`` is raised by a read from a connection that is closed already."""

logger = logging.getLogger(__name__)


class AnswerTooLargeError(httpx2.TransportError):
    """The upstream's answer is over the limit; the rest of it is not read."""


class TransportCauseError(Exception):
    """Carries the ``Cause`` of a transport error; chained to httpx2's exception as its ``__cause__``."""

    def __init__(self, cause: Cause) -> None:
        super().__init__(cause.value)
        self.cause = cause


class UpstreamTransport(httpx2.AsyncBaseTransport):
    """Sends requests over pooled connections, and limits the size of each answer's body.

    The errors that come out are httpx2's, without a text of their own: aiohttp's texts quote the header field
    or the bytes that could not be parsed, and the instrumentation around this transport puts the text of an
    error on the span. Each has a ``TransportCauseError`` chained to it.

    Redirects are not followed, cookies are not kept, and of the environment only ``SSL_CERT_FILE`` and
    ``SSL_CERT_DIR`` are read: no proxies, no ``.netrc``.
    aiohttp repeats a GET once if an idle connection turns out to be closed; it never repeats a POST.

    Args:
        max_connections: Connections at the same time; a request that needs one more waits.
        max_bytes: The largest body that is accepted.
        socket_factory: Makes the sockets; aiohttp's own where it is None.
    """

    def __init__(
        self, max_connections: int, max_bytes: int, socket_factory: "SocketFactoryType | None" = None
    ) -> None:
        self._max_connections = max_connections
        self._max_bytes = max_bytes
        self._socket_factory = socket_factory
        # SSL_CERT_FILE and SSL_CERT_DIR name a private authority, as they do for every program with OpenSSL.
        self._tls = httpx2.create_ssl_context(trust_env=True)
        self._session: aiohttp.ClientSession | None = None
        self._monitors: WeakKeyDictionary[ResponseHandler, _ConnectionMonitor] = WeakKeyDictionary()

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send one request; reading the answer's body raises ``AnswerTooLargeError`` beyond the limit."""
        limits = request.extensions.get("timeout", {})
        session = self._session or self._open()
        try:
            answer = await session.request(
                request.method,
                _yarl_url(str(request.url)),
                headers=[
                    *request.extensions.get(FIELDS, {}).items(),
                    *(item for item in request.headers.multi_items() if item[0] not in NOT_SENT),
                ],
                data=_data_of(request),
                allow_redirects=False,
                # The limit on connecting includes the resolution of the name.
                timeout=aiohttp.ClientTimeout(
                    None, connect=limits.get("connect"), sock_read=limits.get("read")
                ),
            )
        except AIOHTTP_ERRORS as error:
            _raise_translated(error)
        # Only unencoded bytes were asked for. A body that claims another encoding is not decoded, and so
        # fails as an invalid answer.
        fields = [
            (ENCODED.encode() if name.lower() == b"content-encoding" else name, value)
            for name, value in answer.raw_headers
        ]
        # aiohttp lets the connection go when the whole answer has arrived.
        protocol = None if answer.connection is None else answer.connection.protocol
        monitor = None if protocol is None else self._monitors.get(protocol)
        return httpx2.Response(answer.status, headers=fields, stream=_Body(answer, self._max_bytes, monitor))

    def _open(self) -> aiohttp.ClientSession:
        # Not in the constructor: the session belongs to the event loop that is running.
        self._session = aiohttp.ClientSession(
            connector=_Connector(
                self._monitors,
                limit=self._max_connections,
                keepalive_timeout=KEEP_ALIVE_S,
                ssl=self._tls,
                socket_factory=self._socket_factory,
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=NO_AUTO_HEADERS,
            auto_decompress=False,
            max_line_size=MAX_HEAD_LINE,
            max_field_size=MAX_HEAD_LINE,
        )
        return self._session

    async def aclose(self) -> None:
        """Close every connection; an answer that is being read fails."""
        for monitor in list(self._monitors.values()):
            monitor.fail_read(aiohttp.ClientPayloadError())
        if self._session is not None:
            await self._session.close()


class _Connector(aiohttp.TCPConnector):
    """Monitors each connection, and does not reuse one on which unrequested bytes have arrived.

    Those bytes would be taken for the answer to the next request, which is another caller's.

    Args:
        monitors: Filled in with the monitor of each connection.
        options: As the base class has them.
    """

    def __init__(
        self,
        monitors: "WeakKeyDictionary[ResponseHandler, _ConnectionMonitor]",
        **options: Any,  # noqa: ANN401 - as the base class has them
    ) -> None:
        super().__init__(**options)
        self._monitors = monitors

    async def connect(
        self,
        req: aiohttp.ClientRequest,
        traces: "list[Trace]",
        timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109 - as the base class has it
    ) -> "Connection":
        """A connection from the pool, or a new one."""
        while True:
            try:
                connection = await super().connect(req, traces, timeout)
            except asyncio.CancelledError as error:
                # The caller of this transport has a time limit too; it sees here what that ended.
                raise error from TransportCauseError(Cause.CONNECT_TIMEOUT)
            protocol = connection.protocol
            if protocol is None or protocol not in self._monitors:
                if protocol is not None:
                    self._monitors[protocol] = _ConnectionMonitor(protocol.closed)
                return connection
            if not protocol.should_close:
                return connection
            connection.close()


class _ConnectionMonitor:
    """Fails the read that is in progress on a connection when the connection is closed.

    aiohttp does so itself, except when the answer's framing was invalid: then the read would wait for its
    time limit.

    Args:
        closed: Done when the connection is closed, with an exception if it was not closed in order; None when
            it is closed already.
    """

    def __init__(self, closed: "asyncio.Future[None] | None") -> None:
        self._content: aiohttp.StreamReader | None = None
        self._closed = closed
        if closed is not None:
            closed.add_done_callback(self._on_closed)

    @property
    def was_reset(self) -> bool:
        """Whether the connection was broken, instead of closed in order."""
        closed = self._closed
        return closed is not None and closed.done() and closed.exception() is not None

    def watch(self, content: aiohttp.StreamReader | None) -> None:
        """Take the body that is being read now; None when no body is."""
        self._content = content
        if content is not None and (self._closed is None or self._closed.done()):
            self._on_closed(self._closed)

    def fail_read(self, error: aiohttp.ClientPayloadError) -> None:
        """Let the read in progress raise this, unless the body has ended or failed already."""
        content = self._content
        if content is not None and not content.is_eof() and content.exception() is None:
            content.set_exception(error)

    def _on_closed(self, closed: "asyncio.Future[None] | None") -> None:
        # Retrieved in any case: asyncio logs an exception that nobody has retrieved.
        reset = closed is not None and closed.exception() is not None
        # aiohttp closes a connection by itself when it cannot parse what it has received.
        self.fail_read(aiohttp.ClientPayloadError() if reset else _InvalidFramingError())


class UpstreamClient(httpx2.AsyncClient):
    """An httpx2 client that hands complete requests to its transport.

    httpx2's own client merges a base URL, query, cookies and header fields into each request, and follows
    redirects and challenges to authenticate. Here there are none of these.

    Args:
        transport: Sends the requests.
    """

    def __init__(self, transport: httpx2.AsyncBaseTransport) -> None:
        super().__init__(transport=transport, follow_redirects=False, trust_env=False)
        self._exchange = transport

    async def send(self, request: httpx2.Request, *, stream: bool = False, **_given: Any) -> httpx2.Response:  # noqa: ANN401 - as the base class has it
        """Send a request; the answer's body is read unless it is a stream."""
        response = await self._exchange.handle_async_request(request)
        response.request = request
        if not stream:
            try:
                await response.aread()
            except BaseException:
                await response.aclose()
                raise
        return response


@lru_cache(MAX_CACHED_URLS)
def _yarl_url(url: str) -> URL:
    return URL(url, encoded=True)


def _raise_translated(error: Exception) -> NoReturn:
    """Raise httpx2's error for one of aiohttp's, with its cause chained on."""
    # The frames hold the body, and the body's reader holds the error: a reference cycle.
    error.__traceback__ = None
    row = next(row for row in TRANSLATIONS if isinstance(error, row.errors))
    cause = _connect_cause(error.os_error) if row.cause is None else row.cause  # type: ignore[attr-defined]
    if logger.isEnabledFor(logging.DEBUG):
        name = type(error).__name__
        text = name if row.quotes else f"{name}: {error}"
        logger.debug("Exchange with the upstream failed: %s: %s", cause.value, text)
    raise row.kind(row.kind.__name__) from TransportCauseError(cause)


def _connect_cause(error: OSError) -> Cause:
    match error:
        case TimeoutError():
            return Cause.CONNECT_TIMEOUT
        case ConnectionRefusedError():
            return Cause.REFUSED
        case ConnectionError():
            # TCP was connected, so it was the TLS handshake that was reset.
            return Cause.TLS
        case _:
            # No route to the host or its network.
            return Cause.REFUSED


class _Translation(NamedTuple):
    """One row of the table from aiohttp's errors to httpx2's.

    ``quotes`` says that the error's text quotes what was sent or received, which may hold a prompt or a key:
    then the text is not logged. ``cause`` is None where the operating system's error decides.
    """

    errors: type[Exception] | tuple[type[Exception], ...]
    kind: type[httpx2.TransportError]
    cause: Cause | None
    quotes: bool


class _InvalidFramingError(aiohttp.ClientPayloadError):
    """The body's framing, for instance a chunk's size, is not valid HTTP."""


TRANSLATIONS: Final = (
    _Translation(aiohttp.ConnectionTimeoutError, httpx2.ConnectTimeout, Cause.CONNECT_TIMEOUT, quotes=False),
    _Translation(TimeoutError, httpx2.ReadTimeout, Cause.READ_TIMEOUT, quotes=False),
    _Translation(aiohttp.ClientSSLError, httpx2.ConnectError, Cause.TLS, quotes=False),
    # The second is a host name that cannot be encoded.
    _Translation(
        (aiohttp.ClientConnectorDNSError, UnicodeError), httpx2.ConnectError, Cause.DNS, quotes=False
    ),
    _Translation(aiohttp.InvalidURL, httpx2.ConnectError, Cause.DNS, quotes=True),
    _Translation(aiohttp.ClientConnectorError, httpx2.ConnectError, None, quotes=False),
    _Translation(_InvalidFramingError, httpx2.ReadError, Cause.PROTOCOL, quotes=True),
    _Translation(aiohttp.ClientPayloadError, httpx2.ReadError, Cause.RESET, quotes=True),
    _Translation(OSError, httpx2.ReadError, Cause.RESET, quotes=False),
    _Translation(ValueError, httpx2.LocalProtocolError, Cause.PROTOCOL, quotes=True),
    # Closed before the end of the head, which the first one quotes.
    _Translation(
        (aiohttp.ServerDisconnectedError, RuntimeError), httpx2.RemoteProtocolError, Cause.RESET, quotes=True
    ),
    _Translation(Exception, httpx2.RemoteProtocolError, Cause.PROTOCOL, quotes=True),
)
"""The first row that fits decides. Decided by type: texts are for people."""


class _Body(httpx2.AsyncByteStream):
    """An answer's body, in the pieces in which it arrives."""

    def __init__(
        self, answer: aiohttp.ClientResponse, max_bytes: int, monitor: _ConnectionMonitor | None
    ) -> None:
        self._answer = answer
        self._max_bytes = max_bytes
        self._monitor = monitor
        if monitor is not None:
            monitor.watch(answer.content)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        seen = 0
        read = self._answer.content.readany
        try:
            while data := await read():
                seen += len(data)
                if self._answer.status >= ERROR_STATUS and seen > MAX_ERROR_BYTES:
                    # The status says enough. The rest stays unread, so the connection is closed.
                    yield data[: MAX_ERROR_BYTES - seen]
                    return
                if seen > self._max_bytes:
                    # One read may hold the last events within the limit, too.
                    if within := data[: self._max_bytes - seen]:
                        yield within
                    raise AnswerTooLargeError(f"more than {self._max_bytes} bytes")
                yield data
        except AIOHTTP_ERRORS as error:
            _raise_translated(error)
        if self._monitor is not None and self._monitor.was_reset:
            # Without a length and without chunks the end of the connection is the end of the body, and
            # aiohttp takes a reset for that too.
            headers = self._answer.headers
            if "Content-Length" not in headers and "Transfer-Encoding" not in headers:
                _raise_translated(ConnectionResetError())

    async def aclose(self) -> None:
        """Release the connection: to the pool when the body was read to its end, closed otherwise."""
        if self._monitor is not None:
            self._monitor.watch(None)
        if self._answer.content.at_eof():
            self._answer.release()
        else:
            self._answer.close()


def _data_of(request: httpx2.Request) -> AsyncIterable[bytes] | bytes | None:
    """The request's body, as aiohttp takes it: in chunks where it is large, or still arriving."""
    stream = request.stream
    if not isinstance(stream, httpx2.SyncByteStream) and isinstance(stream, httpx2.AsyncByteStream):
        return stream
    content = b"".join(stream)
    return _chunks(content) if len(content) > MAX_UNCHUNKED_BYTES else content or None


async def _chunks(content: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(content), CHUNK_BYTES):
        yield content[start : start + CHUNK_BYTES]
