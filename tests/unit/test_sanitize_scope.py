"""A request's scope is sanitized before the instrumentation reads it."""

from typing import Any

import pytest

from service.middleware.request_id import sanitize_scope

PARENT = (b"traceparent", b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00")
CONTEXT = [PARENT, (b"TraceState", b"a=b"), (b"baggage", b"user=x")]


def _scope(*headers: tuple[bytes, bytes], query: bytes = b"") -> dict[str, Any]:
    return {"type": "http", "headers": list(headers), "query_string": query}


def test_a_plain_request_is_left_as_it_is() -> None:
    scope = _scope((b"host", b"a"), *CONTEXT, query=b"a=b%20c")
    headers = scope["headers"]
    sanitize_scope(scope, trust_traceparent=True)
    assert scope["headers"] is headers
    assert scope == _scope((b"host", b"a"), *CONTEXT, query=b"a=b%20c")


@pytest.mark.parametrize(
    ("sent", "read"),
    [
        (b"caf\xe9", "café"),
        ("café".encode(), "café"),
        (b"\xff\xfe", "ÿþ"),
        (b"\xed\xa0\x80", "í\xa0\x80"),  # a surrogate, which is no UTF-8
    ],
)
def test_bytes_that_are_not_utf8_are_read_as_latin_1(sent: bytes, read: str) -> None:
    scope = _scope((b"user-agent", sent), (b"host", b"a"), query=b"q=" + sent)
    sanitize_scope(scope, trust_traceparent=True)
    assert dict(scope["headers"])[b"user-agent"].decode() == read
    assert scope["query_string"].decode() == f"q={read}"
    assert (b"host", b"a") in scope["headers"]


def test_an_untrusted_trace_context_is_taken_away_and_nothing_else() -> None:
    scope = _scope((b"host", b"a"), *CONTEXT, (b"x-request-id", b"1"), (b"x", b"\xff"))
    sanitize_scope(scope, trust_traceparent=False)
    assert scope["headers"] == [(b"host", b"a"), (b"x-request-id", b"1"), (b"x", "ÿ".encode())]


def test_a_trusted_trace_context_stays_beside_odd_bytes() -> None:
    scope = _scope(*CONTEXT, (b"x", b"\xff"))
    sanitize_scope(scope, trust_traceparent=True)
    assert scope["headers"] == [*CONTEXT, (b"x", "ÿ".encode())]
