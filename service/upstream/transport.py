"""HTTP to the upstream, under the SDK: aiohttp's transport, the fastest that the SDK supports, with bounds.

The SDK offers its own adapter for aiohttp (``openai[aiohttp]``); it takes a broken connection for a slow one,
and errors of the parser pass it by, so this one stands in its place behind the same interface.
"""

from collections.abc import AsyncIterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

import aiohttp
import httpx2
from aiohttp.http_exceptions import HttpProcessingError
from yarl import URL

if TYPE_CHECKING:
    import asyncio

    from aiohttp.client_proto import ResponseHandler

MAX_HEAD_LINE: Final = 65_536
"""Longest line of an answer's head, in bytes."""

NOTHING_ADDED: Final = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")
"""What aiohttp would add to a request that does not have it."""

PLAIN: Final = "ascii"
"""What header fields are encoded in; httpx2 finds it out anew, from all of them, at each look-up of one."""

KNOWN_URLS: Final = 64
KEEP_ALIVE_S: Final = 4.0
"""So long an idle connection is kept: uvicorn, which LiteLLM runs on, closes it after 5 s, and a request that
meets that on its way is lost."""


PIECE_BYTES: Final = 65_536
LARGE_BYTES: Final = 2**20
"""A body over this is sent in pieces: aiohttp warns of larger ones, which would hold the event loop up."""

FAILURES: Final = (aiohttp.ClientError, HttpProcessingError, OSError, RuntimeError, ValueError)
"""What aiohttp raises; a ``RuntimeError`` is what reading from a connection comes to that has gone."""


class AnswerTooLargeError(httpx2.TransportError):
    """The upstream's answer is over the limit; the rest of it is not read."""


class UpstreamTransport(httpx2.AsyncBaseTransport):
    """Sends requests over pooled connections, and counts the bytes of each answer's body.

    A transport's errors quote the header field or the bytes that they choked on, and the instrumentation
    around this one puts an error's text on the span: what comes out here is httpx2's class, and no text. No
    redirect is followed, no cookie kept, and nothing of the environment (proxies, ``.netrc``) is looked at.
    A GET that a connection was closed upon is sent once more, by aiohttp; a POST never is.

    Args:
        max_connections: Connections at the same time; whoever needs one more waits.
        max_bytes: The largest body that passes.
    """

    def __init__(self, max_connections: int, max_bytes: int) -> None:
        self._max_connections = max_connections
        self._max_bytes = max_bytes
        self._tls = httpx2.create_ssl_context(trust_env=False)
        self._session: aiohttp.ClientSession | None = None
        self._watches: WeakKeyDictionary[ResponseHandler, _Watch] = WeakKeyDictionary()

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send one request; reading the answer's body raises ``AnswerTooLargeError`` beyond the limit."""
        limits = request.extensions.get("timeout", {})
        session = self._session or self._open()
        try:
            answer = await session.request(
                request.method,
                _parsed(str(request.url)),
                headers=request.headers.multi_items(),
                data=_sent(request.content),
                allow_redirects=False,
                # The whole of connecting, the look-up of the name too.
                timeout=aiohttp.ClientTimeout(
                    None, connect=limits.get("connect"), sock_read=limits.get("read")
                ),
            )
        except FAILURES as error:
            raise _translated(error) from None
        # Nothing but plain bytes was asked for. Some that say otherwise are not unpacked: they are nonsense.
        fields = [(name, value) for name, value in answer.raw_headers if name.lower() != b"content-encoding"]
        body = _Body(answer, self._max_bytes, self._watch(answer))
        response = httpx2.Response(answer.status, headers=fields, stream=body)
        if all(value.isascii() for _, value in fields):
            response.headers.encoding = PLAIN
        return response

    def _open(self) -> aiohttp.ClientSession:
        # In here, not before: it belongs to the event loop that runs now.
        self._session = aiohttp.ClientSession(
            connector=_Connector(limit=self._max_connections, keepalive_timeout=KEEP_ALIVE_S, ssl=self._tls),
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=NOTHING_ADDED,
            auto_decompress=False,
            max_line_size=MAX_HEAD_LINE,
            max_field_size=MAX_HEAD_LINE,
        )
        return self._session

    def _watch(self, answer: aiohttp.ClientResponse) -> "_Watch | None":
        """What is told when the answer's connection goes; None where all of the answer is here already."""
        if answer.connection is None or answer.connection.protocol is None:
            return None
        protocol = answer.connection.protocol
        watch = self._watches.get(protocol)
        if watch is None:
            watch = self._watches[protocol] = _Watch(protocol.closed)
        return watch

    async def aclose(self) -> None:
        """Close every connection."""
        if self._session is not None:
            await self._session.close()


class _Connector(aiohttp.TCPConnector):
    """Does not use a connection again on which something has come that nobody asked for.

    It would be taken for the answer to the next request: somebody else's.
    """

    async def _get(self, key: Any, traces: Any) -> Any:  # noqa: ANN401 - aiohttp's own
        while True:
            connection = await super()._get(key, traces)
            if connection is None or connection.protocol is None or not connection.protocol.should_close:
                return connection
            connection.close()


class _Watch:
    """Tells whoever reads over a connection that it has gone.

    aiohttp does so itself, but not when the answer's framing was broken before, nor when the connection is
    closed from this side: the reader would wait until a time limit.

    Args:
        closed: Done when the connection has gone; None when it has.
    """

    def __init__(self, closed: "asyncio.Future[None] | None") -> None:
        self.content: aiohttp.StreamReader | None = None
        self._closed = closed
        if closed is not None:
            closed.add_done_callback(self._gone)

    @property
    def failed(self) -> bool:
        """Whether the connection broke, instead of being closed in order."""
        closed = self._closed
        return closed is not None and closed.done() and closed.exception() is not None

    def begin(self, content: aiohttp.StreamReader) -> None:
        """Somebody reads this now."""
        self.content = content
        if self._closed is None:
            self._break_off()

    def _gone(self, closed: "asyncio.Future[None]") -> None:
        # Looked at, or asyncio complains that nobody did.
        closed.exception()
        self._break_off()

    def _break_off(self) -> None:
        content = self.content
        if content is not None and not content.is_eof() and content.exception() is None:
            content.set_exception(aiohttp.ClientPayloadError())


class UpstreamClient(httpx2.AsyncClient):
    """httpx2's client for requests that are whole when they come from the SDK.

    A client has a base, query, cookies and fields of its own, and merges them into each request; here there
    are none, and the few addresses are parsed once.

    Args:
        transport: What sends the requests.
    """

    def __init__(self, transport: httpx2.AsyncBaseTransport) -> None:
        super().__init__(transport=transport, follow_redirects=False, trust_env=False)

    def build_request(self, method: str, url: httpx2.URL | str, **given: Any) -> httpx2.Request:  # noqa: ANN401 - as the base class has it
        """A request of these parts; ``timeout`` is given by the SDK for each."""
        timeout = given.pop("timeout")
        # Packed answers are not asked for: a few bytes could hold a thousand times the limit.
        headers = [*given.pop("headers"), ("Accept-Encoding", "identity")]
        request = httpx2.Request(
            method,
            _known(str(url)),
            headers=headers,
            extensions={"timeout": httpx2.Timeout(timeout).as_dict()},
            **given,
        )
        request.headers.encoding = PLAIN
        return request


@lru_cache(KNOWN_URLS)
def _known(url: str) -> httpx2.URL:
    return httpx2.URL(url)


@lru_cache(KNOWN_URLS)
def _parsed(url: str) -> URL:
    return URL(url, encoded=True)


def _translated(error: Exception) -> httpx2.TransportError:
    """The error of httpx2 that says the same: could not be reached, was too slow, or broke."""
    # Its frames hold what was read, and are held by the reader that raised it: a circle.
    error.__traceback__ = None
    match error:
        case aiohttp.ConnectionTimeoutError():
            kind: type[httpx2.TransportError] = httpx2.ConnectTimeout
        case TimeoutError():
            kind = httpx2.ReadTimeout
        case aiohttp.ClientConnectorError() | aiohttp.InvalidURL() | UnicodeError():
            # The last is a host name that cannot be one.
            kind = httpx2.ConnectError
        case aiohttp.ClientOSError() | aiohttp.ClientPayloadError() | OSError():
            kind = httpx2.ReadError
        case ValueError():
            # What was to be sent is no HTTP.
            kind = httpx2.LocalProtocolError
        case _:
            # Closed before an answer, or what came is no HTTP.
            kind = httpx2.RemoteProtocolError
    return kind(kind.__name__)


class _Body(httpx2.AsyncByteStream):
    """An answer's body, in the pieces in which it arrives."""

    def __init__(self, answer: aiohttp.ClientResponse, max_bytes: int, watch: _Watch | None) -> None:
        self._answer = answer
        self._max_bytes = max_bytes
        self._watch = watch
        if watch is not None:
            watch.begin(answer.content)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        seen = 0
        read = self._answer.content.readany
        try:
            while data := await read():
                seen += len(data)
                if seen > self._max_bytes:
                    raise AnswerTooLargeError(f"more than {self._max_bytes} bytes")
                yield data
        except FAILURES as error:
            raise _translated(error) from None
        if self._watch is not None and self._watch.failed and _ends_with_connection(self._answer):
            raise httpx2.ReadError("ReadError")

    async def aclose(self) -> None:
        """Let the connection go: back to the pool when all was read, closed otherwise."""
        if self._watch is not None:
            self._watch.content = None
        if self._answer.content.at_eof():
            self._answer.release()
        else:
            self._answer.close()


def _ends_with_connection(answer: aiohttp.ClientResponse) -> bool:
    return "Content-Length" not in answer.headers and "Transfer-Encoding" not in answer.headers


def _sent(content: bytes) -> bytes | AsyncIterator[bytes] | None:
    return _pieces(content) if len(content) > LARGE_BYTES else content or None


async def _pieces(content: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(content), PIECE_BYTES):
        yield content[start : start + PIECE_BYTES]
