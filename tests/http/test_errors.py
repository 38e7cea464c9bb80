"""Errors tell the caller what they need and no more, whatever arrives and whatever breaks."""

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from opentelemetry.trace import StatusCode

from tests.fakes.upstream import FakeUpstream
from tests.harness import AppUnderTest
from tests.http.support import (
    RawAnswer,
    assert_error_body,
    completed_line,
    eventually,
    http_request,
    module_app,
    raw,
    server_span,
    trace_of,
    value_of,
)

CANARY = "canary-in-an-exception"
PERMITTED = "https://app.example.com"


async def _breaks_off() -> AsyncIterator[bytes]:
    yield b"the first part"
    # Let the first part out before the rest fails.
    await asyncio.sleep(0)
    raise LookupError(CANARY)


def add_routes(app: FastAPI) -> None:
    @app.get("/test/bug")
    async def bug() -> str:
        try:
            return str(int(CANARY))
        except ValueError as error:
            raise LookupError(CANARY) from error

    @app.get("/test/stream")
    async def stream() -> StreamingResponse:
        return StreamingResponse(_breaks_off())


@pytest.fixture(scope="module")
def app() -> Iterator[AppUnderTest]:
    values = {"cors_origins": (PERMITTED,)}
    with FakeUpstream() as upstream, module_app(add_routes, litellm_url=upstream.url, **values) as served:
        yield served


@pytest.fixture(scope="module")
def token(app: AppUnderTest) -> str:
    return app.token()


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        ({}, {"body.prompt"}),
        ({"prompt": "hi", "temperature": "canary"}, {"body.temperature"}),
        ({"prompt": ["canary"], "max_tokens": -7_654_321}, {"body.prompt", "body.max_tokens"}),
        ({"prompt": "hi", "surplus": "canary"}, {"body.surplus"}),
        ({"prompt": "hi", "model": "<canary>"}, {"body.model"}),
        (b'{"prompt": "canary', {"body.11"}),
        ("canary", {"body"}),
        (["canary"], {"body"}),
    ],
    ids=["nothing", "text", "two", "surplus", "model", "cut off", "a text", "a list"],
)
def test_a_422_names_each_field_and_repeats_no_input(
    app: AppUnderTest, token: str, body: Any, fields: set[str]
) -> None:
    answer = app.call("POST", "/llm/generate", body=body, token=token)

    assert answer.status == 422
    assert_error_body(app, answer, "ValidationError")
    assert {detail["field"] for detail in answer.json["details"]} == fields
    for detail in answer.json["details"]:
        assert set(detail) == {"field", "message", "type"}
        assert detail["message"]
        assert detail["field"] in answer.json["message"]
    assert b"canary" not in answer.body
    assert b"7654321" not in answer.body


def test_a_wrong_sign_in_body_does_not_repeat_the_password(app: AppUnderTest) -> None:
    answer = app.call("POST", "/auth/login", body={"username": 7, "password": ["canary"]})

    assert answer.status == 422
    assert {detail["field"] for detail in answer.json["details"]} == {"body.username", "body.password"}
    assert b"canary" not in answer.body


@pytest.mark.parametrize(
    "data",
    [
        b"\x00\xff not http\r\n\r\n",
        b"GET /health SPDY/9\r\n\r\n",
        b"GET /health HTTP/1.1\r\nno colon here\r\n\r\n",
        b"POST /llm/generate HTTP/1.1\r\nContent-Length: seven\r\n\r\n",
        b"POST /llm/generate HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
    ids=["binary", "protocol", "no colon", "length", "smuggling", "tls"],
)
def test_malformed_http_is_answered_in_our_shape(app: AppUnderTest, data: bytes) -> None:
    received = raw(app.port, data)
    answer = received.answer

    assert received.closed
    assert answer.status == 400
    assert answer.headers["connection"] == "close"
    assert answer.headers["traceresponse"].split("-")[1] == answer.request_id
    assert int(answer.headers["content-length"]) == len(answer.body)
    assert_error_body(app, answer, "BadRequestError")
    span = server_span(app, answer.request_id)
    assert span.parent is None
    assert (span.attributes or {})["error.type"] == "BadRequestError"
    assert completed_line(app, answer.request_id)["error"] == "BadRequestError"


def test_malformed_http_after_a_good_request_has_an_id_of_its_own(app: AppUnderTest) -> None:
    with (
        socket.create_connection(("127.0.0.1", app.port), timeout=5) as connection,
        connection.makefile("rb") as answers,
    ):
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: here\r\n\r\n")
        first = b""
        while not first.endswith(b'{"status":"alive"}'):
            first += answers.read(1)
        connection.sendall(b"\x00\xff not http\r\n\r\n")
        second = RawAnswer(answers.read(), closed=True).answer

    assert second.status == 400
    assert second.request_id not in first.decode()
    assert_error_body(app, second, "BadRequestError")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("User-Agent", b"\xff\\u"),
        ("User-Agent", b"\xed\xa0\x80"),
        ("traceparent", b"\xff\xfe"),
        ("traceparent", b"00-" + b"\xc3" * 32 + b"-" + b"a" * 16 + b"-01"),
        ("tracestate", b"\xff=\xff"),
        ("baggage", b"\xff=\xff"),
        ("X-Request-ID", b"\xff"),
        ("Authorization", b"Bearer \xff\xfe"),
        ("Host", b"\xff"),
        ("X-Forwarded-For", b"\xff"),
    ],
    ids=repr,
)
def test_header_bytes_that_are_no_utf8_do_not_break_ids(app: AppUnderTest, name: str, value: bytes) -> None:
    answer = raw(app.port, http_request("GET", b"/auth/me", {name: value})).answer

    assert answer.status in {400, 401}
    assert_error_body(app, answer, answer.json["error"])
    assert answer.headers["traceresponse"].split("-")[1] == answer.request_id


@pytest.mark.parametrize(
    "target",
    [
        b"/auth/me?\xff",
        b"/auth/me?%ff%fe",
        b"/auth/me?a=%zz",
        b"/auth/me?" + b"&" * 500,
        b"/auth/me?\\u",
        b"/auth/me?x=%00",
        b"/%ff%fe",
        b"/\xff",
        b"//",
        b"http://other.example/auth/me",
    ],
    ids=repr,
)
def test_odd_targets_do_not_break_ids(app: AppUnderTest, target: bytes) -> None:
    answer = raw(app.port, http_request("GET", target, {})).answer

    assert answer.status in {400, 401, 404}
    assert_error_body(app, answer, answer.json["error"])
    assert answer.headers["traceresponse"].split("-")[1] == answer.request_id


def test_a_bug_is_logged_once_with_its_stack_and_answered_without_it(app: AppUnderTest) -> None:
    answer = app.call("GET", "/test/bug")

    assert answer.status == 500
    assert_error_body(app, answer, "InternalError")
    assert CANARY.encode() not in answer.body
    assert b"LookupError" not in answer.body
    trace_of(app, answer.request_id)
    (line,) = [line for line in app.lines(answer.request_id) if "exception.stacktrace" in line]
    assert line["level"] == "ERROR"
    assert line["error"] == "InternalError"
    assert line["exception.type"] == "LookupError"
    stack = line["exception.stacktrace"]
    assert "test_errors.py" in stack
    assert "ValueError" in stack, "the cause too"
    assert CANARY not in stack
    (record,) = [
        record.log_record
        for record in app.records()
        if record.log_record.trace_id == int(answer.request_id, 16)
        and "exception.type" in (record.log_record.attributes or {})
    ]
    assert (record.attributes or {})["exception.stacktrace"] == stack


def test_a_bug_after_the_answer_has_begun_breaks_the_connection(app: AppUnderTest) -> None:
    attributes = {"http.route": "/test/stream", "error.type": "InternalError"}
    before = value_of(app, "http.server.request.duration", attributes)
    received = raw(app.port, b"GET /test/stream HTTP/1.1\r\nHost: here\r\n\r\n")
    answer = received.answer

    assert received.closed
    assert answer.status == 200
    assert answer.body.endswith(b"the first part\r\n"), "and no last chunk, which would say: complete"
    span = server_span(app, answer.request_id)
    assert span.status.status_code is StatusCode.ERROR
    line = completed_line(app, answer.request_id)
    assert line["error"] == "InternalError"
    (logged,) = [line for line in app.lines(answer.request_id) if "exception.stacktrace" in line]
    assert logged["exception.type"] == "LookupError"
    eventually(
        lambda: value_of(app, "http.server.request.duration", attributes) == before + 1, "the duration"
    )


@pytest.mark.parametrize("path", ["/health", "/auth/me", "/nowhere", "/test/bug", "/llm/generate"])
def test_a_permitted_origin_may_read_every_answer(app: AppUnderTest, path: str) -> None:
    answer = app.call("GET", path, headers={"Origin": PERMITTED})

    assert answer.headers["access-control-allow-origin"] == PERMITTED
    exposed = {name.strip() for name in answer.headers["access-control-expose-headers"].lower().split(",")}
    assert {"x-request-id", "traceresponse", "retry-after"} <= exposed


@pytest.mark.parametrize("origin", ["https://evil.example.com", "null", f"{PERMITTED}.evil.com"])
@pytest.mark.parametrize("path", ["/health", "/auth/me", "/test/bug"])
def test_another_origin_may_read_none(app: AppUnderTest, path: str, origin: str) -> None:
    answer = app.call("GET", path, headers={"Origin": origin})

    assert "access-control-allow-origin" not in answer.headers
    assert answer.request_id


@pytest.mark.parametrize(("origin", "status"), [(PERMITTED, 200), ("https://evil.example.com", 400)])
def test_a_preflight_is_answered_for_permitted_origins_only(
    app: AppUnderTest, origin: str, status: int
) -> None:
    sent = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,traceparent",
    }
    answer = app.call("OPTIONS", "/llm/generate", headers=sent)

    assert answer.status == status
    assert answer.headers.get("access-control-allow-origin") == (origin if status == 200 else None)
    assert answer.request_id == answer.headers["traceresponse"].split("-")[1]
