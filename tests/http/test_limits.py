"""What a request may bring and take: size, time, a place in flight, a rate."""

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from service.protocol import Protocol
from tests.fakes.upstream import Answer as Completion
from tests.fakes.upstream import FakeUpstream, Silent
from tests.harness import AppUnderTest, running_app
from tests.http.support import eventually


@pytest.fixture
def limited(upstream: FakeUpstream) -> Iterator[AppUnderTest]:
    with running_app(
        litellm_url=upstream.url,
        max_in_flight=3,
        max_in_flight_per_user=3,
        rate_limit="5/minute",
        request_body_timeout_s=0.4,
        llm_timeout_s=2.0,
        llm_connect_timeout_s=0.5,
    ) as app:
        yield app


def raw(app: AppUnderTest, head: bytes, *, limit_s: float = 5) -> bytes:
    """Send these bytes, then read until the server closes."""
    with socket.create_connection(("127.0.0.1", app.port), timeout=limit_s) as connection:
        connection.sendall(head)
        read = b""
        while piece := connection.recv(65_536):
            read += piece
    return read


def head(token: str, *fields: str) -> bytes:
    lines = ("POST /llm/generate HTTP/1.1", "Host: x", f"Authorization: Bearer {token}", *fields)
    return "\r\n".join((*lines, "", "")).encode()


def test_a_body_that_never_comes_is_answered_in_time(limited: AppUnderTest) -> None:
    answer = raw(limited, head(limited.token(), "Content-Type: application/json", "Content-Length: 100"))
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"error":"RequestTimeoutError"' in answer
    assert b"connection: close" in answer.lower()
    eventually(
        lambda: limited.value("http.server.request.duration", error__type="RequestTimeoutError") == 1,
        "the metric",
    )


def test_a_body_in_drops_is_answered_in_time(limited: AppUnderTest) -> None:
    token = limited.token()
    with socket.create_connection(("127.0.0.1", limited.port), timeout=5) as connection:
        connection.sendall(head(token, "Content-Type: application/json", "Content-Length: 100"))
        connection.settimeout(0.1)
        answer = b""
        for _ in range(30):
            connection.sendall(b" ")
            try:
                answer = connection.recv(65_536)
                break
            except TimeoutError:
                continue
    assert answer.startswith(b"HTTP/1.1 408 ")


def test_a_declared_size_is_refused_before_anything_is_sent(limited: AppUnderTest) -> None:
    answer = raw(limited, head(limited.token(), "Content-Length: 10485760"))
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b'"error":"PayloadTooLargeError"' in answer
    assert limited.value("llmops.requests.rejected", reason="too_large") == 1


def test_a_chunked_body_is_refused_when_it_is_too_large(limited: AppUnderTest) -> None:
    token = limited.token()
    chunk = b"10000\r\n" + b" " * 65_536 + b"\r\n"
    sent = 0
    with socket.create_connection(("127.0.0.1", limited.port), timeout=5) as connection:
        connection.sendall(head(token, "Content-Type: application/json", "Transfer-Encoding: chunked"))
        connection.settimeout(0.02)
        answer = b""
        while not answer and sent < 10_000_000:
            connection.sendall(chunk)
            sent += len(chunk)
            try:
                answer = connection.recv(65_536)
            except TimeoutError:
                continue
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b'"error":"PayloadTooLargeError"' in answer
    assert sent < 2_000_000
    assert limited.value("llmops.requests.rejected", reason="too_large") == 1


def test_more_than_the_limit_in_flight_is_turned_away_at_once(
    limited: AppUnderTest, upstream: FakeUpstream
) -> None:
    token = limited.token()
    upstream.default = Silent()
    with ThreadPoolExecutor(3) as pool:
        waiting = [
            pool.submit(limited.call, "POST", "/llm/generate", body={"prompt": "x"}, token=token)
            for _ in range(3)
        ]
        upstream.wait_for(lambda fake: len(fake.chat_requests) == 3)
        eventually(lambda: limited.value("llmops.requests.in_flight") == 3, "the metric")
        refused = limited.call("POST", "/llm/generate", body={"prompt": "x"}, token=token)
        # What calls no model has places of its own.
        who = limited.call("GET", "/auth/me", token=token)
        health = limited.call("GET", "/health")
    assert refused.status == 503
    assert refused.json["error"] == "OverloadedError"
    assert refused.headers["retry-after"] == "1"
    assert (health.status, who.status) == (200, 200)
    assert {call.result().status for call in waiting} == {504}
    eventually(lambda: limited.value("llmops.requests.in_flight") == 0, "the metric")
    assert limited.value("llmops.requests.rejected", reason="overloaded") == 1


def test_a_user_has_a_rate_and_learns_of_it(limited: AppUnderTest) -> None:
    token, admin = limited.token(), limited.token("admin")
    answers = [limited.call("POST", "/llm/generate", body={"prompt": "x"}, token=token) for _ in range(6)]
    assert [answer.status for answer in answers] == [200, 200, 200, 200, 200, 429]
    assert answers[0].headers["ratelimit-policy"] == '"per-user";q=5;w=60'
    assert answers[0].headers["ratelimit"].startswith('"per-user";r=4;t=')
    last = answers[-1]
    assert last.json["error"] == "RateLimitError"
    assert 1 <= int(last.headers["retry-after"]) <= 60
    assert last.headers["ratelimit"].startswith('"per-user";r=0;t=')
    assert limited.call("GET", "/auth/me", token=token).status == 200
    assert limited.call("POST", "/llm/generate", body={"prompt": "x"}, token=admin).status == 200
    assert limited.value("llmops.requests.rejected", reason="rate_limited") == 1


def test_a_refused_upload_leaves_no_thread_and_no_place_behind(limited: AppUnderTest) -> None:
    token = limited.token()
    before = threading.active_count()
    with ThreadPoolExecutor(3) as pool:
        for answer in pool.map(lambda _: raw(limited, head(token, "Content-Length: 10485760")), range(3)):
            assert answer.startswith(b"HTTP/1.1 413 ")
    eventually(lambda: limited.value("llmops.requests.in_flight") == 0, "the metric")
    assert threading.active_count() <= before


class HastyProtocol(Protocol):
    """Waits for a head only so long."""

    head_timeout_s = 0.2


@pytest.mark.parametrize("begun", [b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nHost: x\r\n"])
def test_a_head_that_never_ends_is_not_waited_for(begun: bytes) -> None:
    with running_app(protocol=HastyProtocol) as app:
        assert raw(app, begun) == b""
        # The second head on a connection too, and a whole one is in time.
        request = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
        assert raw(app, request + begun, limit_s=20).startswith(b"HTTP/1.1 200 ")


def test_a_head_without_end_is_refused(limited: AppUnderTest) -> None:
    answer = raw(limited, b"GET /health HTTP/1.1\r\nHost: x\r\nX-Large: " + b"x" * 100_000)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b'"error":"BadRequestError"' in answer


def test_a_fragment_of_the_next_request_does_not_cost_the_answer(upstream: FakeUpstream) -> None:
    upstream.default = Completion(delay_s=0.5)
    with running_app(protocol=HastyProtocol, litellm_url=upstream.url) as app:
        body = b'{"prompt": "x"}'
        first = head(app.token(), "Content-Type: application/json", f"Content-Length: {len(body)}") + body
        assert raw(app, first + b"GET /auth/me HT", limit_s=20).startswith(b"HTTP/1.1 200 ")


def test_garbage_behind_a_request_does_not_cost_its_answer(limited: AppUnderTest) -> None:
    answer = raw(limited, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n\x00\x01garbage\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 ")


def test_garbage_within_a_body_is_a_bad_request(limited: AppUnderTest) -> None:
    sent = head(limited.token(), "Content-Type: application/json", "Transfer-Encoding: chunked")
    answer = raw(limited, sent + b"ZZZ\r\nnot a chunk\r\n")
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b'"error":"BadRequestError"' in answer


@pytest.mark.parametrize("path", ["/nope", "/health"])
def test_a_body_that_nobody_reads_does_not_go_on_for_ever(limited: AppUnderTest, path: str) -> None:
    chunk = b"10000\r\n" + b" " * 65_536 + b"\r\n"
    sent = 0
    with socket.create_connection(("127.0.0.1", limited.port), timeout=20) as connection:
        connection.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        try:
            for _ in range(2_000):
                connection.sendall(chunk)
                sent += len(chunk)
        except OSError:
            pass
    assert sent < 60_000_000


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_the_health_route_knows_no_limit_of_bodies(limited: AppUnderTest, method: str) -> None:
    answer = raw(
        limited, f"{method} /health HTTP/1.1\r\nHost: x\r\nContent-Length: 20000000\r\n\r\n".encode()
    )
    assert answer.startswith(b"HTTP/1.1 200 " if method == "GET" else b"HTTP/1.1 405 ")
