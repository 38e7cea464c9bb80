"""Instruments the HTTP client of the upstream with the contrib instrumentation."""

from typing import Any

from opentelemetry.instrumentation.httpx import HTTPX2ClientInstrumentor
from opentelemetry.trace import Span, Tracer, TracerProvider
from opentelemetry.util.types import Attributes

from service.telemetry.providers import Telemetry


def instrument_client(client: Any, telemetry: Telemetry) -> None:  # noqa: ANN401 - annotated for httpx only
    """Give each request of the client one CLIENT span, the trace context, and the standard metric."""
    HTTPX2ClientInstrumentor.instrument_client(
        client,
        tracer_provider=_WithoutExceptions(telemetry.tracer_provider),
        meter_provider=telemetry.meter_provider,
    )


class _WithoutExceptions(TracerProvider):
    """Wraps the tracers of another provider: an exception fails its span, and is not recorded as an event.

    Its type is the span's ``error.type``. The event would add the stack trace, which may quote a URL, and
    an attribute that is deprecated (``exception.escaped``).
    """

    def __init__(self, inner: TracerProvider) -> None:
        self._inner = inner

    def get_tracer(
        self,
        instrumenting_module_name: str,
        instrumenting_library_version: str | None = None,
        schema_url: str | None = None,
        attributes: Attributes = None,
    ) -> Tracer:
        library = instrumenting_module_name, instrumenting_library_version
        return _TracerWithoutExceptions(self._inner.get_tracer(*library, schema_url, attributes))


class _TracerWithoutExceptions(Tracer):
    def __init__(self, inner: Tracer) -> None:
        self._inner = inner

    def start_span(self, *arguments: Any, **options: Any) -> Span:  # noqa: ANN401 - passed on as they are
        return self._inner.start_span(*arguments, **{**options, "record_exception": False})

    def start_as_current_span(self, *arguments: Any, **options: Any) -> Any:  # noqa: ANN401 - as above
        return self._inner.start_as_current_span(*arguments, **{**options, "record_exception": False})
