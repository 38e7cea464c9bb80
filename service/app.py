"""Builds the app: the list of middleware, the routers, the error handlers."""

from importlib.metadata import version

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Receive, Scope, Send

from service.config.lifespan import lifespan_of
from service.config.settings import Settings
from service.errors import ServiceError
from service.middleware.errors import ErrorMiddleware, handle_error
from service.middleware.paths import rewrite_path
from service.middleware.request_id import RequestIdMiddleware, sanitize_scope
from service.middleware.request_limits import RequestLimitsMiddleware
from service.middleware.security_headers import SecurityHeadersMiddleware
from service.middleware.shutdown import ShutdownMiddleware
from service.routers import (
    accounts,
    anthropic,
    auth,
    cache,
    keys,
    llm,
    openai,
    requests,
    responses,
    system,
    usage,
)
from service.telemetry.providers import Telemetry
from service.telemetry.server import instrument_server

EXPOSED_HEADERS = (
    "X-Request-ID",
    "traceresponse",
    "Retry-After",
    "X-Should-Retry",
    "RateLimit",
    "RateLimit-Policy",
    "Server-Timing",
    "X-LLM-Attempts",
    "X-Cache",
    "Age",
    "X-Cache-Similarity",
)


class LlmApi(FastAPI):
    """The app, which sanitizes a request before the instrumentation, outside all middleware, reads it."""

    trust_traceparent = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] == "http":
            rewrite_path(scope)
            sanitize_scope(scope, trust_traceparent=self.trust_traceparent)
        await super().__call__(scope, receive, send)


def create_app(settings: Settings, telemetry: Telemetry) -> FastAPI:
    """Build the app; its lifespan opens the clients, and nothing is opened or sent before."""
    app = LlmApi(
        title="LLM API",
        version=version("llmops-api"),
        summary="Calls to large language models: observable, resilient, one trace a request.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan_of(settings, telemetry),
        # FastAPI's own telemetry gives way to the contrib instrumentation by itself; this makes it certain.
        telemetry={"tracing": False, "metrics": False, "logs": False},
        middleware=_middleware(settings, telemetry),
        exception_handlers={
            ServiceError: handle_error,
            HTTPException: handle_error,
            RequestValidationError: handle_error,
        },
    )
    app.trust_traceparent = settings.trust_traceparent == "all"
    # Model calls first: a path is compared with one route after the other, for the answer and for the span.
    for module in (llm, openai, anthropic, responses, auth, keys, accounts, usage, requests, cache, system):
        # Not by include_router, which looks a request up twice, and for the span twice again.
        app.router.routes.extend(module.router.routes)
    app.router.routes.append(system.docs_assets())
    instrument_server(app, telemetry)
    return app


def _middleware(settings: Settings, telemetry: Telemetry) -> list[Middleware]:
    """The middleware, outermost first."""
    return [
        # The request's context and id headers, which everything inside needs for logs and answers.
        Middleware(RequestIdMiddleware, server_timing=settings.server_timing),
        # What browsers and proxies must not do with an answer, whoever makes it.
        Middleware(SecurityHeadersMiddleware),
        # CORS fields on every answer, errors included, so that a permitted browser can read them.
        Middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST", "PUT", "DELETE"],
            # All that the page asks for: client libraries send fields of their own, and new ones with each
            # version. What is not known here is not read.
            allow_headers=["*"],
            expose_headers=EXPOSED_HEADERS,
        ),
        # Exceptions from all that is inside, middleware included, become answers here.
        Middleware(ErrorMiddleware),
        # Counts requests in flight, and turns new ones away while the process drains.
        Middleware(ShutdownMiddleware, rejected=telemetry.instruments.requests_rejected),
        # Concurrency limit, and the limits on a body's size and time.
        Middleware(RequestLimitsMiddleware, settings=settings, instruments=telemetry.instruments),
    ]
