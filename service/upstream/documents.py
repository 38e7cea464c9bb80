"""JSON documents of other servers, for instance an identity provider's keys: bounded in time and size."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Final

import httpx2
from opentelemetry.instrumentation.utils import suppress_instrumentation

from service.upstream.errors import cause_of
from service.upstream.transport import AnswerTooLargeError, UpstreamClient, UpstreamTransport

CONNECT_TIMEOUT_S: Final = 2.0
TIMEOUT_S: Final = 2.5
"""Time limit of one document, from the connection to the last byte; less than that of a health check."""

MAX_BYTES: Final = 262_144
MAX_CONNECTIONS: Final = 16


class DocumentError(Exception):
    """A document cannot be had, or is not what it should be.

    Args:
        reason: One of a few words, fit for an event's attribute: a ``Cause``, ``timeout``, ``too_large``,
            ``not_json``, ``status`` and the number, or what its reader says.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


@asynccontextmanager
async def open_documents(
    timeout_s: float = TIMEOUT_S, max_bytes: int = MAX_BYTES
) -> AsyncIterator["Documents"]:
    """Open one pooled client, and close it at the end of the block; nothing is sent yet.

    Args:
        timeout_s: Time limit of one document.
        max_bytes: The largest document that is read.
    """
    async with UpstreamClient(UpstreamTransport(MAX_CONNECTIONS, max_bytes)) as http:
        yield Documents(http, timeout_s)


class Documents:
    """Gets documents; made by ``open_documents``.

    As with every request of this package, redirects are not followed, and of the environment only
    ``SSL_CERT_FILE`` and ``SSL_CERT_DIR`` are read. There is neither a span nor a metric: no caller asks for
    a document.
    """

    def __init__(self, http: UpstreamClient, timeout_s: float) -> None:
        self._http = http
        self._timeout_s = timeout_s

    async def get(self, url: str) -> object:
        """Get a document and decode it.

        Raises:
            DocumentError: The answer is not 200, not JSON, too large or too slow, or there is none.
        """
        limits = httpx2.Timeout(self._timeout_s, connect=min(CONNECT_TIMEOUT_S, self._timeout_s))
        request = httpx2.Request(
            "GET",
            url,
            # Compressed answers are not asked for: a small one could expand to a multiple of the limit.
            headers={"Accept": "application/json", "Accept-Encoding": "identity"},
            extensions={"timeout": limits.as_dict()},
        )
        try:
            with suppress_instrumentation():
                # The client's own limits are on each read, and a body may arrive byte by byte.
                async with asyncio.timeout(self._timeout_s):
                    answer = await self._http.send(request)
        except TimeoutError:
            raise DocumentError("timeout") from None
        except AnswerTooLargeError:
            raise DocumentError("too_large") from None
        except httpx2.HTTPError as error:
            cause = cause_of(error)
            raise DocumentError("failed" if cause is None else cause.value) from None
        if answer.status_code != HTTPStatus.OK:
            raise DocumentError(f"status {answer.status_code}")
        try:
            document: object = json.loads(answer.content)
        except (ValueError, RecursionError):
            raise DocumentError("not_json") from None
        return document
