"""Server spans and HTTP metrics of the app, by the contrib instrumentation, with what it lacks put right."""

from typing import Any, cast

from fastapi import FastAPI
from opentelemetry.context import Context
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.metrics import Histogram, Meter, MeterProvider
from opentelemetry.semconv.attributes.error_attributes import ERROR_TYPE
from opentelemetry.semconv.attributes.server_attributes import SERVER_ADDRESS
from opentelemetry.semconv.attributes.url_attributes import URL_QUERY
from opentelemetry.semconv.attributes.user_agent_attributes import USER_AGENT_ORIGINAL
from opentelemetry.semconv.metrics.http_metrics import HTTP_SERVER_REQUEST_DURATION
from opentelemetry.trace import Span
from opentelemetry.util.types import Attributes

from service.context import current_request
from service.telemetry.providers import Telemetry

REDACTED = "[redacted]"


def instrument_server(app: FastAPI, telemetry: Telemetry) -> None:
    """Give each request of the app one SERVER span and the standard metrics.

    No spans for single ASGI messages (a stream of four chunks would make nine), and no URL is left out by a
    pattern from outside: a path that is not instrumented would have no request id.
    """
    FastAPIInstrumentor.instrument_app(
        app,
        tracer_provider=telemetry.tracer_provider,
        meter_provider=cast("MeterProvider", _ErrorNames(telemetry.meter_provider)),
        server_request_hook=_redact,
        excluded_urls="",
        exclude_spans=["send", "receive"],
    )


def _redact(span: Span, scope: dict[str, Any]) -> None:
    """Keep out the query string, where people put keys and prompts, and the caller's own words."""
    if scope.get("query_string"):
        span.set_attribute(URL_QUERY, REDACTED)
    # What a caller writes there is theirs, too.
    if any(name == b"user-agent" for name, _ in scope["headers"]):
        span.set_attribute(USER_AGENT_ORIGINAL, REDACTED)
    # The instrumentation puts the port behind the address.
    if scope.get("server"):
        span.set_attribute(SERVER_ADDRESS, scope["server"][0])


class _ErrorNames:
    """A meter provider whose server duration carries the answer's error name as ``error.type``.

    The instrumentation knows the status only, offers no hook for the attributes of its metrics, and one
    status has several errors behind it (503: breaker, overload, draining).
    """

    def __init__(self, inner: MeterProvider | Meter) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    def get_meter(self, *args: Any, **kwargs: Any) -> "_ErrorNames":  # noqa: ANN401 - passed on unread
        return _ErrorNames(cast("MeterProvider", self._inner).get_meter(*args, **kwargs))

    def create_histogram(self, name: str, **kwargs: Any) -> "Histogram | _ErrorNamedHistogram":  # noqa: ANN401 - passed on unread
        histogram = cast("Meter", self._inner).create_histogram(name, **kwargs)
        return _ErrorNamedHistogram(histogram) if name == HTTP_SERVER_REQUEST_DURATION else histogram


class _ErrorNamedHistogram:
    def __init__(self, inner: Histogram) -> None:
        self._inner = inner

    def record(self, amount: float, attributes: Attributes = None, context: Context | None = None) -> None:
        request = current_request.get()
        if request is not None and request.error is not None:
            attributes = {**(attributes or {}), ERROR_TYPE: request.error}
        self._inner.record(amount, attributes, context)
