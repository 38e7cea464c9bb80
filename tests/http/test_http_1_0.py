"""Clients of HTTP/1.0, as nginx is by default: no chunks, and the end of the connection ends an answer."""

import json
import socket
from collections.abc import Iterator

import pytest

from tests.fakes.streams import DONE, RawStream, chunk, text
from tests.fakes.upstream import FakeUpstream
from tests.harness import AppUnderTest, running_app
from tests.http.streaming import STREAMED, events

WHOLE = (text("a "), text("trace"), chunk(reason="stop"), DONE)


@pytest.fixture
def app(upstream: FakeUpstream) -> Iterator[AppUnderTest]:
    with running_app(litellm_url=upstream.url, stream_keep_alive_s=0.05) as served:
        yield served


def _exchange(app: AppUnderTest, head: str, body: bytes = b"", version: str = "1.0") -> tuple[str, bytes]:
    """Everything that comes until the connection is closed: the head in small letters, and the rest."""
    with socket.create_connection(("127.0.0.1", app.port), timeout=10) as connection:
        connection.sendall(f"{head.replace('HTTP/1.0', f'HTTP/{version}')}\r\n\r\n".encode() + body)
        received = b""
        while data := connection.recv(65_536):
            received += data
    found, _, rest = received.partition(b"\r\n\r\n")
    return found.decode().lower(), rest


def _post(app: AppUnderTest, path: str, body: object, *more: str) -> tuple[str, bytes]:
    content = json.dumps(body).encode()
    lines = [
        f"POST {path} HTTP/1.0",
        f"Authorization: Bearer {app.token()}",
        "Content-Type: application/json",
        f"Content-Length: {len(content)}",
        *more,
    ]
    return _exchange(app, "\r\n".join(lines), content)


def test_a_stream_comes_without_chunks(app: AppUnderTest, upstream: FakeUpstream) -> None:
    # With comments between the events: every write is of another length.
    upstream.script(RawStream(WHOLE, interval_s=0.12))
    head, body = _post(app, "/v1/chat/completions", STREAMED)
    assert head.startswith("http/1.1 200")
    assert "transfer-encoding" not in head
    assert "content-length" not in head
    assert "connection: close" in head
    assert events(body) == list(WHOLE)
    assert b": keep-alive\n\n" in body


def test_an_answer_of_known_length_has_it(app: AppUnderTest) -> None:
    head, body = _post(app, "/llm/generate", {"prompt": "x"})
    assert head.startswith("http/1.1 200")
    assert f"content-length: {len(body)}" in head
    assert "transfer-encoding" not in head
    assert json.loads(body)["response"] == "Hello from the fake."


def test_nobody_is_told_to_continue(app: AppUnderTest) -> None:
    head, body = _post(app, "/llm/generate", {"prompt": "x"}, "Expect: 100-continue")
    assert head.startswith("http/1.1 200")
    assert json.loads(body)["response"]


@pytest.mark.parametrize("request_line", ["HEAD /docs HTTP/1.0", "GET /health HTTP/1.0", "GET /x HTTP/1.0"])
def test_other_answers_are_whole(app: AppUnderTest, request_line: str) -> None:
    head, _ = _exchange(app, request_line)
    assert "transfer-encoding" not in head
    assert "x-request-id" in head


@pytest.mark.parametrize("version", ["0.9", "1.2", "2.0", "3.0"])
def test_another_version_is_not_understood(app: AppUnderTest, version: str) -> None:
    head, _ = _exchange(app, "GET /health HTTP/1.0", version=version)
    assert head.startswith("http/1.1 400")
    assert "connection: close" in head


@pytest.mark.parametrize("length", [True, False])
def test_no_content_is_an_answer(app: AppUnderTest, *, length: bool) -> None:
    more = ["Content-Length: 0"] if length else []
    lines = ["POST /auth/logout HTTP/1.0", f"Authorization: Bearer {app.token()}", "Connection: keep-alive"]
    head, body = _exchange(app, "\r\n".join([*lines, *more]))
    assert head.startswith("http/1.1 204")
    assert "connection: close" in head
    assert "transfer-encoding" not in head
    assert body == b""


def test_the_next_connection_speaks_http_1_1(app: AppUnderTest, upstream: FakeUpstream) -> None:
    upstream.script(RawStream(WHOLE))
    content = json.dumps(STREAMED).encode()
    lines = (
        "POST /v1/chat/completions HTTP/1.0",
        "Host: x",
        f"Authorization: Bearer {app.token()}",
        f"Content-Length: {len(content)}",
        "Content-Type: application/json",
        "Connection: close",
    )
    head, _ = _exchange(app, "\r\n".join(lines), content, version="1.1")
    assert "transfer-encoding: chunked" in head
