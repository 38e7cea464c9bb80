"""OpenAI's SDK as this service runs it: the head of its requests is prepared once."""

from collections.abc import AsyncIterable, AsyncIterator, Mapping
from functools import lru_cache
from typing import Final

import httpx2
import openai
from openai import APIConnectionError, APITimeoutError, AsyncOpenAI

from service.upstream.transport import FIELDS, MAX_CACHED_URLS, UpstreamClient

ABOUT_ITSELF: Final = "x-stainless-"
"""Prefix of the header fields in which the SDK describes this machine and itself; they are not sent."""

NOTHING: Final[Mapping[str, str]] = {}


class PreparedOpenAI(AsyncOpenAI):
    """The SDK's client, with a request of its own for complete bodies and absolute URLs.

    The SDK's ``request`` copies its options and makes the header fields and the URL of each request, for
    clients that retry and whose credentials change. Here they do not. So the fields are made once, of what
    the SDK says they are, and ``exchange`` sends them; it raises the SDK's errors. This saves a fifth of a
    call's processor time (``tests/bench/RESULTS.md``).

    Args:
        api_key: The key for LiteLLM.
        base_url: Where LiteLLM's ``/v1`` is.
        http: Sends the requests.
    """

    def __init__(self, api_key: str, base_url: str, http: UpstreamClient) -> None:
        super().__init__(api_key=api_key, base_url=base_url, max_retries=0, http_client=http)
        self._http = http
        given = {**self.auth_headers, **self.default_headers}
        fields = {name.lower(): value for name, value in given.items() if isinstance(value, str)}
        self._fields = {name: fields[name] for name in fields if not name.startswith(ABOUT_ITSELF)}
        # Compressed answers are not asked for: a small one could expand to a multiple of the limit.
        self._fields["accept-encoding"] = "identity"
        self._fields_without_body = {n: value for n, value in self._fields.items() if n != "content-type"}

    @property
    def user_agent(self) -> str:
        """The SDK's own, which would name this class."""
        return f"{AsyncOpenAI.__name__}/Python {openai.__version__}"

    async def exchange(  # noqa: PLR0913 - the parts of a request
        self,
        method: str,
        url: str,
        limits: httpx2.Timeout,
        *,
        content: bytes | AsyncIterable[bytes] | None = None,
        fields: Mapping[str, str] = NOTHING,
        stream: bool = False,
    ) -> httpx2.Response:
        """Send one request, and return the answer, whose body is read unless it is a stream.

        Args:
            method: In capitals.
            url: Absolute.
            limits: The transport's time limits.
            content: The body.
            fields: Header fields by names in lower case; they take the place of the SDK's.
            stream: Whether the answer's body is left unread.

        Raises:
            APIStatusError: The answer's status is not a success; its body has been read.
            APITimeoutError: A time limit of the transport was reached.
            APIConnectionError: There was no answer, or it broke off.
        """
        usual = self._fields_without_body if content is None else self._fields
        request = httpx2.Request(
            method,
            _parsed(url),
            stream=_body_of(content),
            extensions={"timeout": limits.as_dict(), FIELDS: {**usual, **fields} if fields else usual},
        )
        try:
            response = await self._http.send(request, stream=stream)
            if not response.is_success:
                await response.aread()
        except httpx2.TimeoutException as error:
            raise APITimeoutError(request=request) from error
        except httpx2.RequestError as error:
            raise APIConnectionError(request=request) from error
        if response.is_success:
            return response
        raise self._make_status_error_from_response(response)


@lru_cache(MAX_CACHED_URLS)
def _parsed(url: str) -> httpx2.URL:
    return httpx2.URL(url)


class _Body(httpx2.AsyncByteStream):
    """A body that is sent as it arrives."""

    def __init__(self, pieces: AsyncIterable[bytes]) -> None:
        self._pieces = pieces

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for piece in self._pieces:
            yield piece


def _body_of(content: bytes | AsyncIterable[bytes] | None) -> httpx2.AsyncByteStream:
    if content is None or isinstance(content, bytes):
        return httpx2.ByteStream(content or b"")
    return _Body(content)
