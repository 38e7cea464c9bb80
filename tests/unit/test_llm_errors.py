"""What the SDK raises becomes an error of ours: its name, whether to retry, and when."""

import json
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import httpx2
import openai
import pytest

from service.errors import BadRequestError, RateLimitError, UpstreamError, UpstreamTimeoutError
from service.middleware.errors import error_response
from service.upstream.errors import invalid_answer, retry_after, timed_out, translate
from service.upstream.messages import read_object
from tests.unit.llm_answers import failing, sdk_error, translated

NOW = datetime(2026, 1, 15, 10, 30, tzinfo=UTC)


@pytest.mark.parametrize(
    ("status", "name", "answered", "retryable"),
    [
        *((status, "BadRequestError", 400, False) for status in (400, 404, 413, 415, 422)),
        *((status, "UpstreamError", 502, False) for status in (401, 402, 403, 407)),
        (408, "UpstreamTimeoutError", 504, True),
        (429, "RateLimitError", 429, True),
        *((status, "UpstreamError", 502, True) for status in (409, 500, 501, 502, 503, 504, 520, 529, 599)),
        *((status, "UpstreamError", 502, True) for status in (301, 302, 307, 405, 406, 410, 418, 451)),
    ],
)
def test_each_status_has_its_error(status: int, name: str, answered: int, retryable: bool) -> None:  # noqa: FBT001 - pytest passes it by name
    error = translated(status)
    assert (error.name, error.status, error.retryable) == (name, answered, retryable)


@pytest.mark.parametrize("status", [400, 401, 404, 408, 409, 429, 500, 503])
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>canary</html>",
        b"[]",
        b"null",
        b'"canary"',
        b"\xff\xfe",
        b'{"error": "canary"}',
        b'{"error": 5}',
    ],
)
def test_a_body_of_any_shape_is_survived(status: int, body: bytes) -> None:
    error = translate(sdk_error(status, body), {"model": "demo", "messages": []}, known_model=True)
    assert error.status in {400, 429, 502, 504}
    assert "canary" not in error.message


@pytest.mark.parametrize("message", [None, "", 5, ["a"], {"a": "b"}])
def test_a_message_of_any_type_is_survived(message: Any) -> None:
    assert isinstance(translated(400, message), BadRequestError)


@pytest.mark.parametrize("status", [500, 502, 503, 529])
def test_what_an_upstream_says_of_its_own_failure_stays_inside(status: int) -> None:
    assert translated(status, "canary").message == "The model's side failed. Try again."


@pytest.mark.parametrize("status", [401, 402, 403, 407])
def test_our_credentials_are_no_business_of_the_callers(status: int) -> None:
    error = translated(status, "Incorrect API key provided: canary")
    assert error.message == "The model's side refused this service's credentials."


def test_litellms_400_for_a_wrong_key_is_ours_too() -> None:
    error = translated(400, "No connected db.", type="no_db_connection", code="400")
    assert (error.name, error.status, error.retryable) == ("UpstreamError", 502, False)
    assert error.message == "The model's side refused this service's credentials."


@pytest.mark.parametrize(
    ("raised", "name", "says"),
    [
        (httpx2.ConnectError("canary"), "UpstreamTimeoutError", "cannot be reached"),
        (httpx2.ConnectTimeout("canary"), "UpstreamTimeoutError", "Try again"),
        (httpx2.ReadTimeout("canary"), "UpstreamTimeoutError", "did not answer in time"),
        (httpx2.PoolTimeout("canary"), "UpstreamTimeoutError", "did not answer in time"),
        (httpx2.ReadError("canary"), "UpstreamError", "broke the connection"),
        (httpx2.RemoteProtocolError("canary"), "UpstreamError", "broke the connection"),
    ],
)
def test_a_connections_failure_has_its_error(raised: Exception, name: str, says: str) -> None:
    def fail(_request: httpx2.Request) -> httpx2.Response:
        raise raised

    error = translate(failing(fail), {"model": "demo", "messages": []}, known_model=True)
    assert (error.name, error.retryable) == (name, True)
    assert says in error.message
    assert "canary" not in error.message


def test_any_other_sdk_error_is_invalid_answer() -> None:
    request = httpx2.Request("POST", "http://upstream/v1")
    error = translate(openai.APIError("canary", request, body=None), {}, known_model=True)
    assert (error.name, error.message) == ("UpstreamError", invalid_answer().message)


def test_the_time_limit_is_named() -> None:
    error = timed_out(2.5)
    assert isinstance(error, UpstreamTimeoutError)
    assert error.message == "The model did not answer within 2.5 s. Try again."


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("0", 0),
        ("7", 7),
        (" 7\t", 7),
        ("007", 7),
        ("3600", 3_600),
        ("3601", 3_600),
        ("9" * 5_000, 3_600),
        ("Thu, 15 Jan 2026 10:30:09 GMT", 9),
        ("Thu, 15 Jan 2026 11:30:09 +0100", 9),
        ("Thursday, 15-Jan-26 10:30:09 GMT", 9),
        ("Thu Jan 15 10:30:09 2026", 9),
        ("Thu, 15 Jan 2026 10:30:09", 9),
        ("Thu, 15 Jan 2026 10:30:09 -0000", 9),
        ("Thu, 15 Jan 2026 10:29:00 GMT", 0),
        ("Mon, 01 Jan 0001 00:00:00 GMT", 0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 3_600),
    ],
)
def test_both_forms_of_retry_after_are_read_and_bounded(value: str, seconds: float) -> None:
    assert retry_after(value, NOW) == seconds


@pytest.mark.parametrize(
    "value",
    [
        None,
        "",
        " ",
        "-5",
        "+5",
        "1e3",
        "0x10",
        "nan",
        "inf",
        "soon",
        "\x00",
        "１２",  # noqa: RUF001 - digits that are not ASCII
        "²",
        "٣",
        "Thu, 15 Jan 2026",
        "Thu, 99 Jan 2026 10:30:09 GMT",
        "Thu, 15 Foo 2026 10:30:09 GMT",
        "Thu, 15 Jan 99999 10:30:09 GMT",
        "Thu, 15 Jan 2026 10:30:09 +9999",
        "1 1 1 1 1 1",
    ],
)
def test_a_retry_after_that_says_nothing_is_none(value: str | None) -> None:
    assert retry_after(value, NOW) is None


def test_a_date_is_measured_from_now() -> None:
    wait_s = retry_after(format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True))
    assert wait_s is not None
    assert 90 < wait_s <= 100


@pytest.mark.parametrize(
    ("value", "seconds"), [("7", 7), ("99999", 3_600), (None, None), ("soon", None), ("-1", None), ("0", 0)]
)
def test_a_rate_limit_waits_as_asked_and_always_says_when(value: str | None, seconds: float | None) -> None:
    error = translated(429, headers={"Retry-After": value} if value is not None else None)
    assert isinstance(error, RateLimitError)
    assert error.retry_after_s == seconds
    assert error_response(error, {"path": "/llm/generate"}).headers["Retry-After"] == str(
        max(1, int(seconds or 0))
    )


@pytest.mark.parametrize("content", [b'{"a": 1}', b"{}", '{"a": "ü"}'.encode()])
def test_an_object_is_read(content: bytes) -> None:
    assert read_object(content) == json.loads(content)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"5", b"null", b"{", b"<html>", b"\xff", b"\xff\xfe{}", b'{"a":' * 100_000]
)
def test_what_is_no_object_is_an_invalid_answer(content: bytes) -> None:
    with pytest.raises(UpstreamError, match="something that is not an answer") as caught:
        read_object(content)
    # What json choked on is somebody's answer: it must not reach a stack trace.
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None or caught.value.__suppress_context__
