"""What this service itself declines under /v1, in OpenAI's shape; and what a browser may send there."""

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.fakes.streams import RawStream, text
from tests.fakes.upstream import FakeUpstream, Silent, Status
from tests.harness import Answer, AppUnderTest, running_app
from tests.http.streaming import CHAT, STREAMED, calling
from tests.http.support import eventually

PATH = "/v1/chat/completions"


@pytest.fixture
def app(upstream: FakeUpstream) -> Iterator[AppUnderTest]:
    with running_app(
        litellm_url=upstream.url,
        rate_limit="4/minute",
        max_in_flight=2,
        max_in_flight_per_user=2,
        request_body_timeout_s=0.3,
        llm_timeout_s=2.0,
        breaker_failure_threshold=1,
        cors_origins=("https://app.example.org",),
    ) as served:
        yield served


def type_of(answer: Answer) -> str:
    """The error's name."""
    assert answer.json["error"]["request_id"] == answer.request_id
    return str(answer.json["error"]["type"])


def test_the_callers_rate(app: AppUnderTest) -> None:
    token = app.token()
    answers = [app.call("POST", PATH, body=CHAT, token=token) for _ in range(5)]
    assert [answer.status for answer in answers] == [200] * 4 + [429]
    assert type_of(answers[4]) == "RateLimitError"
    assert answers[4].json["error"]["code"] == "rate_limit_exceeded"
    assert int(answers[4].headers["retry-after"]) >= 1
    assert "ratelimit" in answers[0].headers


def test_no_place_left(app: AppUnderTest, upstream: FakeUpstream) -> None:
    token = app.token()
    upstream.script(Silent(), RawStream((text("a"),), "silence"))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(app.call, "POST", PATH, body=CHAT, token=token)
        upstream.wait_for(lambda fake: len(fake.chat_requests) == 1)
        with calling(app, token) as caller:
            assert caller.event()
            # A stream keeps its place to its last byte.
            refused = app.call("POST", PATH, body=CHAT, token=token)
        assert (refused.status, type_of(refused)) == (503, "OverloadedError")
        assert refused.headers["retry-after"] == "1"
        eventually(lambda: app.value("llmops.requests.in_flight") == 1, "the place to be free again")
        assert waiting.result().status == 504


@pytest.mark.parametrize("body", [CHAT, STREAMED], ids=["plain", "streamed"])
def test_an_open_breaker(app: AppUnderTest, upstream: FakeUpstream, body: object) -> None:
    token = app.token()
    upstream.script(Status(500))
    assert app.call("POST", PATH, body=body, token=token).status == 502
    rejected = app.call("POST", PATH, body=body, token=token)
    assert (rejected.status, type_of(rejected)) == (503, "CircuitOpenError")
    assert rejected.headers["x-llm-attempts"] == "0"
    assert int(rejected.headers["retry-after"]) >= 1
    assert len(upstream.chat_requests) == 1


def test_a_body_that_never_comes(app: AppUnderTest) -> None:
    lines = (f"POST {PATH} HTTP/1.1", "Host: x", f"Authorization: Bearer {app.token()}", "Content-Length: 9")
    with socket.create_connection(("127.0.0.1", app.port), timeout=5) as connection:
        connection.sendall("\r\n".join((*lines, "", "")).encode())
        answer = connection.recv(65_536)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"type":"RequestTimeoutError"' in answer


def test_a_browsers_client_may_send_what_openais_library_sends(app: AppUnderTest) -> None:
    asked = (
        "authorization,content-type,openai-beta,x-stainless-lang,x-stainless-retry-count,x-stainless-timeout"
    )
    fields = {
        "Origin": "https://app.example.org",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": asked,
    }
    answer = app.call("OPTIONS", PATH, headers=fields)
    assert answer.status == 200
    answer = app.call("OPTIONS", PATH, headers={**fields, "Origin": "https://elsewhere.example.org"})
    assert answer.status == 400
