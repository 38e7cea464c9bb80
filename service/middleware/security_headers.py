"""Header fields that tell browsers and proxies what not to do with an answer."""

from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

NO_SNIFFING: Final = (b"x-content-type-options", b"nosniff")
NO_FRAMES: Final = (b"content-security-policy", b"frame-ancestors 'none'")
NO_STORE: Final = (b"cache-control", b"no-store")

PUBLIC: Final = ("/", "/docs", "/openapi.json")
PUBLIC_PREFIX: Final = "/docs-assets/"
"""What may be stored: the documentation. The rest is about one caller, errors included, or about now."""


class SecurityHeadersMiddleware:
    """Sets ``X-Content-Type-Options``, ``Content-Security-Policy`` and ``Cache-Control`` on every answer.

    A field that the answer has already is kept.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path: str = scope["path"].removeprefix(scope.get("root_path", ""))
        public = path in PUBLIC or path.startswith(PUBLIC_PREFIX)
        fields = (NO_SNIFFING, NO_FRAMES) if public else (NO_SNIFFING, NO_FRAMES, NO_STORE)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = message["headers"]
                present = [field[0] for field in headers]
                message["headers"] = [*headers, *[field for field in fields if field[0] not in present]]
            await send(message)

        await self._app(scope, receive, send_with_headers)
