"""Puts the trace id into the log context and on the answer, and writes one line for each request."""

import logging
import re
import time
from collections.abc import Callable

from opentelemetry import trace
from opentelemetry.semconv.attributes.error_attributes import ERROR_TYPE
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.context import CallFacts, RequestContext, current_request
from service.errors import CallerLeftError
from service.telemetry.names import ATTR_CLIENT_REQUEST_ID, ATTR_INCIDENT_ID
from service.telemetry.providers import PROBES

TRACE_HEADERS = frozenset({b"traceparent", b"tracestate", b"baggage"})


def sanitize_scope(scope: Scope, *, trust_traceparent: bool) -> None:
    """Change the scope of an HTTP request in place.

    The contrib ASGI middleware decodes header fields and the query string as UTF-8 and lets the error escape,
    past everything that could give the answer a body or an id: bytes that are none are read as Latin-1. An
    untrusted caller's trace context is taken away, so that the request starts a trace of its own.
    """
    if not scope["query_string"].isascii():
        scope["query_string"] = _as_utf8(scope["query_string"])
    headers = scope["headers"]
    if trust_traceparent and all(value.isascii() for _, value in headers):
        return
    scope["headers"] = [
        (name, _as_utf8(value))
        for name, value in headers
        if trust_traceparent or name.lower() not in TRACE_HEADERS
    ]


def _as_utf8(value: bytes) -> bytes:
    try:
        value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1").encode()
    return value


HARMLESS_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
"""What of a caller's own ``X-Request-ID`` is kept: it ends up in logs that people paste into shells."""

RATE_POLICY = "per-user"

logger = logging.getLogger(__name__)


class RequestIdMiddleware:
    """Gives each request its context, and each answer ``X-Request-ID`` and ``traceresponse``.

    The request id is the trace id; ``traceresponse`` is the W3C trace context's level-2 draft. Outermost of
    our own, right inside the instrumentation that starts the server span.
    """

    def __init__(
        self, app: ASGIApp, *, server_timing: bool, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._app = app
        self._server_timing = server_timing
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        await _Responder(self._app, scope, send, self._clock, server_timing=self._server_timing)(receive)


class _Responder:
    """One request on its way."""

    def __init__(
        self, app: ASGIApp, scope: Scope, send: Send, clock: Callable[[], float], *, server_timing: bool
    ) -> None:
        self._app = app
        self._scope = scope
        self._send = send
        self._clock = clock
        self._server_timing = server_timing
        self._span = trace.get_current_span()
        self._status: int | None = None
        span = self._span.get_span_context()
        trace_id, span_id = trace.format_trace_id(span.trace_id), trace.format_span_id(span.span_id)
        self._headers = {
            "X-Request-ID": trace_id,
            "traceresponse": f"00-{trace_id}-{span_id}-{span.trace_flags:02x}",
        }
        offered = Headers(scope=scope).get("x-request-id", "")
        self._context = RequestContext(
            request_id=trace_id,
            incident_id=f"inc_{span_id}",
            entered_s=clock(),
            client_request_id=offered if HARMLESS_ID.fullmatch(offered) else None,
        )

    async def __call__(self, receive: Receive) -> None:
        # Not reset afterwards: the instrumentation outside reads the error's name when all is done, and the
        # server gives each request a task, hence a context, of its own.
        current_request.set(self._context)
        self._span.set_attribute(ATTR_INCIDENT_ID, self._context.incident_id)
        if self._context.client_request_id is not None:
            self._span.set_attribute(ATTR_CLIENT_REQUEST_ID, self._context.client_request_id)
        try:
            await self._app(self._scope, receive, self._send_with_ids)
        finally:
            # Once more: what broke an answer that had begun came after the first time.
            self._mark_error()
            self._write_line(self._clock() - self._context.entered_s)

    async def _send_with_ids(self, message: Message) -> None:
        if message["type"] != "http.response.start":
            await self._send(message)
            return
        self._status = message["status"]
        fields = self._headers | answer_fields(self._context)
        if self._server_timing and self._context.call is not None:
            total_s = self._clock() - self._context.entered_s
            fields["Server-Timing"] = server_timing(self._context.call, self._context.auth_s, total_s)
        MutableHeaders(scope=message).update(fields)
        await self._send(message)
        # After the instrumentation has put the bare status there.
        self._mark_error()

    def _mark_error(self) -> None:
        if self._context.error is None or not self._span.is_recording():
            return
        self._span.set_attribute(ERROR_TYPE, self._context.error)
        if self._context.error == CallerLeftError.__name__:
            # Whatever the status was: nobody has got the answer.
            self._span.set_status(trace.StatusCode.ERROR)

    def _write_line(self, duration_s: float) -> None:
        route = self._scope.get("route")
        fields: dict[str, object] = {
            "http.request.method": self._scope["method"],
            "http.route": getattr(route, "path", None),
            "http.response.status_code": self._status,
            "duration_s": round(duration_s, 6),
            "error": self._context.error,
        }
        level = logging.DEBUG if self._scope["path"] in PROBES else logging.INFO
        logger.log(
            level,
            "http_request_completed",
            extra={name: value for name, value in fields.items() if value is not None},
        )


def answer_fields(context: RequestContext) -> dict[str, str]:
    """The header fields about the caller's rate limit and the model call, on success and on error alike.

    Rate limits are written as draft-ietf-httpapi-ratelimit-headers-10 has them.
    """
    fields = {}
    rate, call = context.rate, context.call
    if rate is not None:
        fields["RateLimit-Policy"] = f'"{RATE_POLICY}";q={rate.quota};w={rate.window_s}'
        fields["RateLimit"] = f'"{RATE_POLICY}";r={rate.remaining};t={rate.reset_s}'
    if call is not None:
        fields["X-LLM-Attempts"] = str(call.attempts)
        fields["X-Cache"] = call.cache.upper()
        if call.cache == "hit":
            fields["Age"] = str(int(call.age_s))
        if call.similarity is not None:
            fields["X-Cache-Similarity"] = f"{call.similarity:.4f}"
    return fields


def server_timing(call: CallFacts, auth_s: float, total_s: float) -> str:
    """The value of ``Server-Timing`` (W3C): milliseconds by what they were spent on."""
    spent = {
        "auth": auth_s,
        "cache": call.lookup_s,
        "llm": call.llm_s,
        "retry": call.retry_s,
        "total": total_s,
    }
    always = {"auth", "llm", "total"}
    return ", ".join(
        f"{name};dur={seconds * 1_000:.1f}" for name, seconds in spent.items() if seconds or name in always
    )
