"""Gives each request its id and log context, and writes one log line for each request.

``sanitize_scope`` runs before the OpenTelemetry instrumentation, outside all middleware;
``RequestIdMiddleware`` is the outermost middleware, inside the instrumentation that starts the server span.
"""

import logging
import re
import time
from collections.abc import Callable
from typing import Any, cast

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.instrumentation.asgi import asgi_getter
from opentelemetry.propagate import extract, get_global_textmap
from opentelemetry.semconv._incubating.attributes.enduser_attributes import ENDUSER_ID
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.config.log_records import log
from service.context import CallFacts, RequestContext, current_request
from service.dependencies import services_of
from service.errors import ErrorFacts
from service.middleware.errors import is_anthropic_path
from service.recording.recent import FailedRequest
from service.telemetry.events import error_fields
from service.telemetry.names import ATTR_CLIENT_REQUEST_ID, ATTR_INCIDENT_ID, ATTR_KEY_ID, ATTR_TEAM
from service.telemetry.providers import PROBES

CLIENT_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
"""Accepted values of a caller's ``X-Request-ID``. They appear in logs, from where people copy them into
shells, so other values are ignored."""

MAX_METHOD_CHARS = 32

TRACE_HEADERS = frozenset({b"traceparent", b"tracestate", b"baggage"})

logger = logging.getLogger(__name__)


class RequestIdMiddleware:
    """Creates the request's context, and sets ``X-Request-ID`` and ``traceresponse`` on each answer.

    The request id is the trace id. ``traceresponse`` is defined in level 2 of the W3C's trace context. While
    the process drains, each answer ends its connection: the client's next request goes to another process.

    Args:
        app: The next ASGI app.
        server_timing: Whether answers to model calls get ``Server-Timing``.
        clock: Monotonic, in seconds.
    """

    def __init__(
        self, app: ASGIApp, *, server_timing: bool, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._app = app
        self._server_timing = server_timing
        self._clock = clock
        self._trace_fields = frozenset(field.encode() for field in get_global_textmap().fields)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        span = trace.get_current_span()
        ids = span.get_span_context()
        trace_id, span_id = trace.format_trace_id(ids.trace_id), trace.format_span_id(ids.span_id)
        given = dict(reversed(scope["headers"]))
        client_request_id = given.get(b"x-request-id", b"").decode("latin-1")
        request = RequestContext(
            request_id=trace_id,
            incident_id=f"inc_{span_id}",
            continued=not self._trace_fields.isdisjoint(given) and _is_continued(scope, ids),
            entered_s=self._clock(),
            client_request_id=client_request_id if CLIENT_REQUEST_ID.fullmatch(client_request_id) else None,
        )
        # Not reset at the end: the instrumentation reads the error's name after this middleware has returned,
        # and the server runs each request in a context of its own.
        current_request.set(request)
        span.set_attribute(ATTR_INCIDENT_ID, request.incident_id)
        if request.client_request_id is not None:
            span.set_attribute(ATTR_CLIENT_REQUEST_ID, request.client_request_id)
        status: int | None = None

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = self._fields(scope, request, f"00-{trace_id}-{span_id}-{ids.trace_flags:02x}")
                message["headers"] = [field for field in message["headers"] if field[0] not in own]
                message["headers"] += own.items()
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        finally:
            duration_s = self._clock() - request.entered_s
            _log_completed(scope, request, status, duration_s)
            if request.failure is not None:
                _remember(scope, request, request.failure, status, duration_s)

    def _fields(self, scope: Scope, request: RequestContext, traceresponse: str) -> dict[bytes, bytes]:
        """The answer's fields about the request, the caller's rate limit and the model call, errors or not.

        Rate limits are written as draft-ietf-httpapi-ratelimit-headers-10 has them.
        """
        request_id, rate, call = request.request_id.encode(), request.rate, request.call
        fields = {b"x-request-id": request_id, b"traceresponse": traceresponse.encode()}
        if is_anthropic_path(scope):
            # Where Anthropic's libraries look for it.
            fields[b"request-id"] = request_id
        if services_of(scope).drain.draining:
            # A balancer that passes connections on, and not requests, keeps this one here.
            fields[b"connection"] = b"close"
        if rate is not None:
            policy = rate.policy.encode()
            fields[b"ratelimit-policy"] = b'"%b";q=%d;w=%d' % (policy, rate.quota, rate.window_s)
            fields[b"ratelimit"] = b'"%b";r=%d;t=%d' % (policy, rate.remaining, rate.reset_s)
        if call is not None:
            fields[b"x-llm-attempts"] = b"%d" % call.attempts
            fields[b"x-cache"] = call.cache.upper().encode()
            if call.cache == "hit":
                fields[b"age"] = b"%d" % call.age_s
            if call.similarity is not None:
                fields[b"x-cache-similarity"] = b"%.4f" % call.similarity
            if self._server_timing:
                fields[b"server-timing"] = _timing(request, call, self._clock()).encode()
        return fields


def _is_continued(scope: Scope, ids: trace.SpanContext) -> bool:
    """Whether the trace is the caller's.

    Read from the request again: a server span that is not recorded does not know its parent.
    """
    carrier = cast("dict[str, Any]", scope)
    parent = trace.get_current_span(extract(carrier, Context(), asgi_getter)).get_span_context()
    return parent.is_valid and parent.trace_id == ids.trace_id


def _timing(request: RequestContext, call: CallFacts, now_s: float) -> str:
    """The value of ``Server-Timing`` (W3C): milliseconds by what they were spent on."""
    spent_s = {"auth": request.auth_s, "cache": call.lookup_s, "llm": call.llm_s, "retry": call.retry_s}
    if not call.lookup_s:
        del spent_s["cache"]
    if not call.retry_s:
        del spent_s["retry"]
    spent_s["total"] = now_s - request.entered_s
    return ", ".join([f"{name};dur={seconds * 1_000:.1f}" for name, seconds in spent_s.items()])


def _log_completed(scope: Scope, request: RequestContext, status: int | None, duration_s: float) -> None:
    level = logging.DEBUG if scope["path"] in PROBES else logging.INFO
    if not logger.isEnabledFor(level):
        return
    fields: dict[str, Any] = {"http.request.method": scope["method"]}
    route = scope.get("route")
    if isinstance(route, (Route, Mount)):
        fields["http.route"] = route.path
    if status is not None:
        fields["http.response.status_code"] = status
    fields["duration_s"] = round(duration_s, 6)
    if request.user is not None:
        # On this line only, since each field of every line costs time; the trace id leads here from the rest.
        fields[ENDUSER_ID] = request.user
        if request.team is not None:
            fields[ATTR_TEAM] = request.team
        if request.key_id is not None:
            fields[ATTR_KEY_ID] = request.key_id
    if request.failure is not None:
        # This line says everything that the error's body says.
        fields |= {"error": request.failure.name, **error_fields(request.failure)}
    log(logger, level, "http_request_completed", fields)


def _remember(
    scope: Scope, request: RequestContext, failure: ErrorFacts, status: int | None, duration_s: float
) -> None:
    """Keep a failed request for who asks what became of it."""
    route = scope.get("route")
    services_of(scope).explainer.recent.keep_failed(
        FailedRequest(
            request_id=request.request_id,
            incident_id=request.incident_id,
            continued=request.continued,
            started_ns=time.time_ns() - int(duration_s * 1e9),
            duration_s=round(duration_s, 6),
            method=scope["method"][:MAX_METHOD_CHARS],
            route=route.path if isinstance(route, (Route, Mount)) else None,
            status=status,
            error=failure,
            auth_s=round(request.auth_s, 6),
            called=request.call is not None,
            user=request.user,
            team=request.team,
            key_id=request.key_id,
        )
    )


def sanitize_scope(scope: Scope, *, trust_traceparent: bool) -> None:
    """Replace undecodable bytes in the scope of an HTTP request, and remove an untrusted trace context.

    The ASGI instrumentation decodes header fields and the query string as UTF-8 and raises where that fails,
    outside of the middleware that could answer. Bytes that are not UTF-8 are therefore read as Latin-1.

    Args:
        scope: The scope, which is changed in place.
        trust_traceparent: Whether the caller's trace context is kept.
    """
    if not scope["query_string"].isascii():
        scope["query_string"] = _as_utf8(scope["query_string"])
    headers = scope["headers"]
    if trust_traceparent:
        for _, value in headers:
            if not value.isascii():
                break
        else:
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
