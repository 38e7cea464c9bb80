"""Refuses new requests while the process drains, and tracks the requests in flight for the drain."""

import asyncio

from opentelemetry.metrics import Counter
from starlette.types import ASGIApp, Receive, Scope, Send

from service.dependencies import services_of
from service.errors import ShuttingDownError
from service.telemetry.providers import PROBES


class ShutdownMiddleware:
    """Lets requests in flight finish within the drain's limit, and refuses new ones after the grace period.

    Health routes are always answered, and the drain does not wait for them. A request that is cancelled at
    the limit ends with ``ShuttingDownError``, if its answer has not started.

    Args:
        app: The next ASGI app.
        rejected: The counter ``llmops.requests.rejected``.
    """

    def __init__(self, app: ASGIApp, rejected: Counter) -> None:
        self._app = app
        self._rejected = rejected

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] != "http" or scope["path"] in PROBES:
            await self._app(scope, receive, send)
            return
        drain = services_of(scope).drain
        try:
            # Without a limit at first: the drain reschedules it to cancel the request.
            async with asyncio.timeout(None) as limit:
                if not drain.enter(limit):
                    self._rejected.add(1, {"reason": "draining"})
                    raise ShuttingDownError
                try:
                    await self._app(scope, receive, send)
                finally:
                    drain.leave(limit)
        except TimeoutError:
            if limit.expired():
                raise ShuttingDownError("This process is stopping, and your request took too long.") from None
            raise
