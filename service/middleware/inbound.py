"""Makes a request harmless before the instrumentation reads it."""

from starlette.types import Scope

TRACE_HEADERS = frozenset({b"traceparent", b"tracestate", b"baggage"})


def make_harmless(scope: Scope, *, trust_traceparent: bool) -> None:
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
