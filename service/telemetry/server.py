"""Instruments the app with the contrib instrumentation: SERVER spans and the standard HTTP metrics.

The instrumentation offers no hook for the attributes of its metrics. ``_ServerMeter`` therefore hands
it a histogram that adds the error's name; ``tests/contract/test_vendor_internals.py`` checks the
instruments that the instrumentation creates.
"""

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from opentelemetry.context import Context
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.metrics import Histogram, NoOpHistogram, UpDownCounter
from opentelemetry.semconv._incubating.metrics.http_metrics import HTTP_SERVER_RESPONSE_BODY_SIZE
from opentelemetry.semconv.attributes.error_attributes import ERROR_TYPE
from opentelemetry.semconv.attributes.server_attributes import SERVER_ADDRESS
from opentelemetry.semconv.attributes.url_attributes import URL_PATH, URL_QUERY
from opentelemetry.semconv.attributes.user_agent_attributes import USER_AGENT_ORIGINAL
from opentelemetry.semconv.metrics.http_metrics import HTTP_SERVER_REQUEST_DURATION
from opentelemetry.trace import Span
from opentelemetry.util.types import Attributes

from service.context import current_request
from service.telemetry.providers import Telemetry, WrappedMeter, WrappedMeterProvider
from service.telemetry.tally import TallyUpDownCounter

REDACTED = "[redacted]"
API_KEY = "llmops_"
"""How an API key begins; one may be in a path by mistake."""


def instrument_server(app: FastAPI, telemetry: Telemetry) -> None:
    """Give each request of the app one SERVER span and the standard metrics.

    There are no spans for single ASGI messages, which would be nine for a stream of four chunks. No URL is
    excluded, whatever the environment says: a request without a span would have no request id.
    """
    FastAPIInstrumentor.instrument_app(
        app,
        tracer_provider=telemetry.tracer_provider,
        meter_provider=WrappedMeterProvider(telemetry.meter_provider, _ServerMeter),
        server_request_hook=_redact,
        excluded_urls="",
        exclude_spans=["send", "receive"],
    )


def _redact(span: Span, scope: dict[str, Any]) -> None:
    """Remove what may contain keys or prompts from the span: the query string, the user agent, an API key."""
    changed: dict[str, str] = {}
    if scope.get("query_string"):
        changed[URL_QUERY] = REDACTED
    if API_KEY in scope["path"]:
        changed[URL_PATH] = REDACTED
    for name, _ in scope["headers"]:
        if name == b"user-agent":
            changed[USER_AGENT_ORIGINAL] = REDACTED
            break
    # The instrumentation appends the port to the address.
    if scope.get("server"):
        changed[SERVER_ADDRESS] = scope["server"][0]
    span.set_attributes(changed)


class _ServerMeter(WrappedMeter):
    """The instrumentation's meter, with the two kinds of instruments that it uses."""

    def create_up_down_counter(self, name: str, unit: str = "", description: str = "") -> UpDownCounter:
        return TallyUpDownCounter(self._inner, name, unit, description)

    def create_histogram(
        self,
        name: str,
        unit: str = "",
        description: str = "",
        *,
        explicit_bucket_boundaries_advisory: Sequence[float] | None = None,
    ) -> Histogram:
        if name == HTTP_SERVER_RESPONSE_BODY_SIZE:
            # The instrumentation stores the size on an object that all requests share, so it is wrong for
            # streams.
            return NoOpHistogram(name, unit, description)
        histogram = self._inner.create_histogram(
            name,
            unit,
            description,
            explicit_bucket_boundaries_advisory=explicit_bucket_boundaries_advisory,
        )
        return _ErrorNameHistogram(histogram) if name == HTTP_SERVER_REQUEST_DURATION else histogram


class _ErrorNameHistogram(Histogram):
    """Sets ``error.type`` to the name of the answer's error; the status alone cannot tell errors apart."""

    def __init__(self, inner: Histogram) -> None:
        self._inner = inner

    def record(self, amount: float, attributes: Attributes = None, context: Context | None = None) -> None:
        request = current_request.get()
        if request is not None and request.error is not None:
            attributes = {**(attributes or {}), ERROR_TYPE: request.error}
        self._inner.record(amount, attributes, context)
