"""OpenAI's SDK as this service runs it: the head of its requests is prepared once."""

from collections.abc import AsyncIterable, AsyncIterator, Mapping
from functools import lru_cache
from typing import Any, Final

import httpx2
import openai
from openai import APIConnectionError, APITimeoutError, AsyncOpenAI

from service.upstream.transport import FIELDS, MAX_CACHED_URLS, UpstreamClient

ABOUT_ITSELF: Final = "x-stainless-"
"""Prefix of the header fields in which the SDK describes this machine and itself; they are not sent."""


class PreparedOpenAI(AsyncOpenAI):
    """The SDK's client with a shorter ``request``, which its ``get``, ``post`` and ``delete`` end in.

    The SDK's own ``request`` copies the options and makes the header fields and the URL of each request, for
    clients that retry and whose credentials change. Here they do not, so the fields are made once, of what
    the SDK says they are: this saves a tenth of a call (``tests/bench/RESULTS.md``).

    Args:
        api_key: The key for LiteLLM.
        base_url: Where LiteLLM's ``/v1`` is.
        http: Sends the requests.
    """

    def __init__(self, api_key: str, base_url: str, http: UpstreamClient) -> None:
        super().__init__(api_key=api_key, base_url=base_url, max_retries=0, http_client=http)
        self._http = http
        given = {**self.auth_headers, **self.default_headers}
        self._fields = {
            name.lower(): value
            for name, value in given.items()
            if isinstance(value, str) and not name.lower().startswith(ABOUT_ITSELF)
        }
        # Compressed answers are not asked for: a small one could expand to a multiple of the limit.
        self._fields["accept-encoding"] = "identity"

    @property
    def user_agent(self) -> str:
        """The SDK's, which names the class otherwise."""
        return f"{AsyncOpenAI.__name__}/Python {openai.__version__}"

    async def request(  # the answer is always an httpx2.Response
        self,
        cast_to: Any,  # noqa: ANN401 - as the base class has it
        options: Any,  # noqa: ANN401 - of a type that the SDK keeps to itself
        *,
        stream: bool = False,
        stream_cls: Any = None,  # noqa: ANN401 - as above
    ) -> Any:  # noqa: ANN401 - as above
        """Send one request, without retries; the answer's body is read unless it is a stream.

        Args:
            cast_to: Always ``httpx2.Response``.
            options: The method, the absolute URL, the body, the time limits, and header fields in lower case,
                which take the place of the SDK's.
            stream: Whether the answer's body is left unread.
            stream_cls: Not used.

        Raises:
            APIStatusError: The answer is no success; its body has been read.
            APITimeoutError: A time limit of the transport was reached.
            APIConnectionError: There was no answer, or it broke off.
        """
        del cast_to, stream_cls
        request = httpx2.Request(
            options.method,
            _url_of(options.url),
            stream=_body_of(options.content),
            extensions={
                "timeout": options.timeout.as_dict(),
                FIELDS: self._fields_of(options.method, options.headers),
            },
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
        raise self._make_status_error_from_response(response) from None

    def _fields_of(self, method: str, given: Mapping[str, str] | openai.NotGiven) -> Mapping[str, str]:
        fields = {**self._fields, **given} if given else self._fields
        return (
            fields if method == "post" else {name: fields[name] for name in fields if name != "content-type"}
        )


@lru_cache(MAX_CACHED_URLS)
def _url_of(url: str) -> httpx2.URL:
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
