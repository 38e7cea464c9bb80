"""A caller's own X-Request-ID is kept where it is harmless, never as ours; trust can be taken away."""

import secrets
from collections.abc import Iterator

import pytest

from tests.fakes.upstream import FakeUpstream
from tests.harness import AppUnderTest
from tests.http.support import (
    TraceParent,
    as_json,
    http_request,
    module_app,
    raw,
    server_span,
    trace_of,
)

GENERATE = {"prompt": "What is a trace?"}


@pytest.fixture(scope="module")
def app() -> Iterator[AppUnderTest]:
    with FakeUpstream() as upstream, module_app(litellm_url=upstream.url) as served:
        yield served


@pytest.fixture(scope="module")
def token(app: AppUnderTest) -> str:
    return app.token()


@pytest.mark.parametrize(
    "offered",
    ["order-4711", "a", "A.b_c:d/e+f=0", "x" * 128, "0f" * 16],
    ids=lambda text: text[:16],
)
def test_a_harmless_one_is_kept_beside_ours(app: AppUnderTest, token: str, offered: str) -> None:
    sent = {"X-Request-ID": offered}
    answer = app.call("POST", "/llm/generate", body=GENERATE, token=token, headers=sent)

    assert answer.status == 200
    assert answer.request_id != offered
    assert answer.json["request_id"] == answer.request_id
    span = server_span(app, answer.request_id)
    assert f"{span.context.trace_id:032x}" == answer.request_id
    assert (span.attributes or {})["client_request_id"] == offered
    lines = app.lines(answer.request_id)
    assert len(lines) >= 3
    assert {line["client_request_id"] for line in lines} == {offered}


def test_it_is_kept_on_the_lines_of_a_failure_too(app: AppUnderTest) -> None:
    answer = app.call("GET", "/auth/me", headers={"X-Request-ID": "order-4711"})

    assert answer.status == 401
    trace_of(app, answer.request_id)
    assert {line["client_request_id"] for line in app.lines(answer.request_id)} == {"order-4711"}


@pytest.mark.parametrize(
    "offered",
    [
        b"x" * 129,
        b"",
        b"two words",
        b"tab\tinside",
        b'quote"inside',
        b"quote'inside",
        b"back`tick",
        b"$(touch x)",
        b"a;b",
        b"<script>",
        b"percent%0a",
        b"brace{}",
        b"back\\slash",
        "übermäßig".encode(),
        "übermäßig".encode("latin-1"),
        b"\xff\xfe",
    ],
)
def test_a_harmful_one_is_dropped(app: AppUnderTest, token: str, offered: bytes) -> None:
    headers = {"X-Request-ID": offered, "Authorization": f"Bearer {token}".encode()}
    answer = raw(app.port, http_request("POST", b"/llm/generate", headers, as_json(GENERATE))).answer

    assert answer.status == 200
    span = server_span(app, answer.request_id)
    assert "client_request_id" not in (span.attributes or {})
    assert all("client_request_id" not in line for line in app.lines(answer.request_id))


@pytest.mark.parametrize("offered", [b"\x00", b"a\x01b", b"a\x7fb", b"\x1b[31mred"])
def test_control_characters_never_reach_log_or_span(app: AppUnderTest, offered: bytes) -> None:
    answer = raw(app.port, http_request("GET", b"/auth/me", {"X-Request-ID": offered})).answer

    assert answer.status in {400, 401}, "refused as malformed, or handled without the field"
    span = server_span(app, answer.request_id)
    assert "client_request_id" not in (span.attributes or {})
    lines = app.lines(answer.request_id)
    assert lines
    assert all("client_request_id" not in line for line in lines)


def test_an_id_in_our_own_form_does_not_become_ours(app: AppUnderTest) -> None:
    offered = secrets.token_hex(16)
    answer = app.call("GET", "/nowhere", headers={"X-Request-ID": offered})

    assert answer.request_id != offered
    assert answer.json["request_id"] == answer.request_id
    assert not app.spans(offered)


@pytest.mark.parametrize("trust", ["all", "none"])
def test_trust_in_a_callers_trace_context_is_a_setting(upstream: FakeUpstream, trust: str) -> None:
    parent = TraceParent.new("01")
    sent = {"traceparent": parent.header, "tracestate": "vendor=1", "baggage": "tenant=canary"}
    with module_app(litellm_url=upstream.url, trust_traceparent=trust) as app:
        answer = app.call("POST", "/llm/generate", body=GENERATE, token=app.token(), headers=sent)
        span = server_span(app, answer.request_id)

    assert answer.status == 200
    (passed_on,) = upstream.chat_requests
    assert passed_on.headers["traceparent"].split("-")[1] == answer.request_id
    if trust == "all":
        assert answer.request_id == parent.trace_id
    else:
        assert answer.request_id != parent.trace_id
        assert span.parent is None
    assert "baggage" not in passed_on.headers
    assert "tracestate" not in passed_on.headers
