"""Bounds what a request may bring: it must be HTTP, and its body of a bounded size."""

from opentelemetry.metrics import Counter
from starlette.datastructures import Headers
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from service.config.logging import current_request
from service.errors import BadRequestError, PayloadTooLargeError

MALFORMED = "llmops.malformed"
"""Set in the scope by our HTTP protocol when what came in is no HTTP request."""


class RequestLimitsMiddleware:
    """Refuses a body over the limit: a declared one before any of it is read, any other as it arrives.

    Starlette's own middleware counts what arrives. It would answer a declared size with a body of its own
    shape, so that is looked at here.

    Args:
        app: What is protected.
        max_body_bytes: The largest body that passes.
        rejected: The counter ``llmops.requests.rejected``.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int, rejected: Counter) -> None:
        self._app = RequestBodyLimitMiddleware(app, max_body_bytes)
        self._max_body_bytes = max_body_bytes
        self._rejected = rejected

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if MALFORMED in scope:
            raise BadRequestError("This is not a valid HTTP request.")
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdigit() and int(declared) > self._max_body_bytes:
            self._rejected.add(1, {"reason": "too_large"})
            # The body is not read, so the connection cannot serve another request.
            raise PayloadTooLargeError(
                f"The request's body is {declared} bytes long; the limit is {self._max_body_bytes}.",
                headers={"Connection": "close"},
            )
        await self._app(scope, receive, send)
        request = current_request.get()
        if request is not None and request.error == PayloadTooLargeError.__name__:
            self._rejected.add(1, {"reason": "too_large"})
