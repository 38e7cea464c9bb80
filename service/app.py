"""Builds the app: the middleware in its order, the routers, the error handlers."""

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
from service.middleware.request_id import RequestIdMiddleware, sanitize_scope
from service.middleware.request_limits import RequestLimitsMiddleware
from service.middleware.shutdown import ShutdownMiddleware
from service.routers import auth, cache, llm, openai, system
from service.telemetry.providers import Telemetry
from service.telemetry.server import instrument_server

EXPOSED = (
    "X-Request-ID",
    "traceresponse",
    "Retry-After",
    "RateLimit",
    "RateLimit-Policy",
    "Server-Timing",
    "X-LLM-Attempts",
    "X-Cache",
    "Age",
    "X-Cache-Similarity",
)

ACCEPTED = (
    *("Authorization", "Content-Type", "X-Request-ID", "traceparent", "tracestate", "OpenAI-Beta"),
    "Cache-Control",
    # What OpenAI's library for JavaScript sends from a browser, too; it goes no further than here.
    *(
        f"X-Stainless-{name}"
        for name in (
            *("Lang", "Package-Version", "OS", "Arch", "Runtime", "Runtime-Version"),
            *("Retry-Count", "Timeout", "Helper-Method"),
        )
    ),
)


class LlmApi(FastAPI):
    """The app, which sanitizes a request before the instrumentation, outside all middleware, reads it."""

    trust_traceparent = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] == "http":
            sanitize_scope(scope, trust_traceparent=self.trust_traceparent)
        await super().__call__(scope, receive, send)


def create_app(settings: Settings, telemetry: Telemetry) -> FastAPI:
    """Build the app; nothing is opened and nothing is sent before its lifespan starts."""
    app = LlmApi(
        title="LLM API",
        version=version("llmops-api"),
        summary="Calls to large language models: observable, resilient, one trace a request.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan_of(settings, telemetry),
        # FastAPI's own telemetry stands aside for the contrib instrumentation; here it is off for certain.
        telemetry={"tracing": False, "metrics": False, "logs": False},
        middleware=_middleware(settings, telemetry),
        exception_handlers={
            ServiceError: handle_error,
            HTTPException: handle_error,
            RequestValidationError: handle_error,
        },
    )
    app.trust_traceparent = settings.trust_traceparent == "all"
    for router in (auth.router, llm.router, cache.router, openai.router, system.router):
        app.include_router(router)
    app.router.routes.append(system.docs_assets())
    instrument_server(app, telemetry)
    return app


def _middleware(settings: Settings, telemetry: Telemetry) -> list[Middleware]:
    """Outermost first."""
    return [
        # Everything inside may log and answer: context and header come first.
        Middleware(RequestIdMiddleware, server_timing=settings.server_timing),
        # Answers of every kind, errors included, must be readable for a permitted browser.
        Middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=ACCEPTED,
            expose_headers=EXPOSED,
        ),
        # What is raised further in, by middleware too, becomes an answer here.
        Middleware(ErrorMiddleware),
        # Who is inside is let out; nobody new comes in while the process drains.
        Middleware(ShutdownMiddleware, rejected=telemetry.instruments.requests_rejected),
        # Nothing further in is reached without a place, nor with a body beyond the limits.
        Middleware(RequestLimitsMiddleware, settings=settings, instruments=telemetry.instruments),
    ]
