"""Counts requests in flight to the last byte, and turns new ones away while the process drains."""

import asyncio

from opentelemetry.metrics import Counter
from starlette.types import ASGIApp, Receive, Scope, Send

from service.dependencies import services_of
from service.errors import ShuttingDownError
from service.services.drain import Drain
from service.telemetry.providers import PROBES


class ShutdownMiddleware:
    """Lets a request end that has begun, within the drain's limit, and refuses one that comes too late.

    Health routes are always answered, and never waited for. A request that is cut off at the limit ends with
    ``ShuttingDownError``, where its answer has not begun.

    Args:
        app: What is protected.
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
        if drain.refusing:
            self._rejected.add(1, {"reason": "draining"})
            raise ShuttingDownError
        await self._serve(drain, scope, receive, send)

    async def _serve(self, drain: Drain, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            # Without a limit now; the drain pulls it to the present when the time is over.
            async with asyncio.timeout(None) as limit:
                drain.enter(limit)
                try:
                    await self._app(scope, receive, send)
                finally:
                    drain.leave(limit)
        except TimeoutError:
            if limit.expired():
                raise ShuttingDownError("This process is stopping, and your request took too long.") from None
            raise
