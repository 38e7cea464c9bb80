"""An HTTP transport that bounds the answers it reads, and whose errors quote nothing."""

from collections.abc import AsyncIterator

import httpx2


class AnswerTooLargeError(httpx2.TransportError):
    """The upstream's answer is over the limit; the rest of it is not read."""


class BoundedTransport(httpx2.AsyncBaseTransport):
    """Passes requests on to another transport and counts the bytes of each answer's body.

    A transport's errors quote the header field or the bytes that they choked on, and the instrumentation
    around this one puts an error's text on the span: what comes out here has the same class, and no text.

    Args:
        inner: The transport that does the work; closed with this one.
        max_bytes: The largest body that passes.
    """

    def __init__(self, inner: httpx2.AsyncBaseTransport, max_bytes: int) -> None:
        self._inner = inner
        self._max_bytes = max_bytes

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send one request; reading the answer's body raises ``AnswerTooLargeError`` beyond the limit."""
        try:
            response = await self._inner.handle_async_request(request)
        except httpx2.TransportError as error:
            raise type(error)(type(error).__name__) from None
        # Nothing but plain bytes was asked for. Some that say otherwise are not unpacked: a few packed ones
        # could hold a thousand times the limit. They read as nonsense instead.
        response.headers.pop("Content-Encoding", None)
        stream = response.stream
        if isinstance(stream, httpx2.AsyncByteStream):
            response.stream = _BoundedStream(stream, self._max_bytes)
        return response

    async def aclose(self) -> None:
        """Close the transport inside."""
        await self._inner.aclose()


class _BoundedStream(httpx2.AsyncByteStream):
    def __init__(self, inner: httpx2.AsyncByteStream, max_bytes: int) -> None:
        self._inner = inner
        self._max_bytes = max_bytes

    async def __aiter__(self) -> AsyncIterator[bytes]:
        seen = 0
        async for chunk in self._inner:
            seen += len(chunk)
            if seen > self._max_bytes:
                raise AnswerTooLargeError(f"more than {self._max_bytes} bytes")
            yield chunk

    async def aclose(self) -> None:
        await self._inner.aclose()
