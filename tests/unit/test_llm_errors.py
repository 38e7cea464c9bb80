"""What the SDK raises becomes an error of ours: its name, whether to retry, and when."""

import json
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any, get_args

import httpx2
import openai
import pytest
from openai.types.responses.response_error import ResponseError

from service.errors import (
    BadRequestError,
    Cause,
    RateLimitError,
    ServiceError,
    UpstreamError,
    UpstreamTimeoutError,
)
from service.middleware.errors import error_response
from service.upstream.errors import from_event, invalid_answer, retry_after, timed_out, translate
from service.upstream.messages import read_object
from service.upstream.reasons import CODES
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
    ("raised", "name", "says", "again"),
    [
        (httpx2.ConnectError("canary"), "UpstreamTimeoutError", "cannot be reached", True),
        (httpx2.ConnectTimeout("canary"), "UpstreamTimeoutError", "Try again", True),
        # The request was sent: a repeat would be paid for again.
        (httpx2.ReadTimeout("canary"), "UpstreamTimeoutError", "did not answer in time", False),
        (httpx2.PoolTimeout("canary"), "UpstreamTimeoutError", "did not answer in time", True),
        (httpx2.ReadError("canary"), "UpstreamError", "broke the connection", True),
        (httpx2.RemoteProtocolError("canary"), "UpstreamError", "broke the connection", True),
    ],
)
def test_a_connections_failure_has_its_error(raised: Exception, name: str, says: str, *, again: bool) -> None:
    def fail(_request: httpx2.Request) -> httpx2.Response:
        raise raised

    error = translate(failing(fail), {"model": "demo", "messages": []}, known_model=True)
    assert (error.name, error.retryable, error.transient) == (name, again, True)
    assert says in error.message
    assert "canary" not in error.message


def test_any_other_sdk_error_is_invalid_answer() -> None:
    request = httpx2.Request("POST", "http://upstream/v1")
    error = translate(openai.APIError("canary", request, body=None), {}, known_model=True)
    assert (error.name, error.message) == ("UpstreamError", invalid_answer().message)


def test_the_time_limit_is_named() -> None:
    error = timed_out(2.5)
    assert isinstance(error, UpstreamTimeoutError)
    assert error.message.startswith("The model did not answer within 2.5 s.")
    assert (error.retryable, error.transient) == (False, True)


def test_a_connection_that_was_not_made_in_time_may_be_tried_again() -> None:
    error = timed_out(2.5, Cause.CONNECT_TIMEOUT)
    assert error.message == "The model's side could not be reached within 2.5 s. Try again."
    assert (error.retryable, error.transient) == (True, True)


CONTEXT = (
    "This model's maximum context length is 8192 tokens. However, your messages resulted in 9001 tokens."
)
UNPAID = "You exceeded your current quota, please check your plan and billing details."
MORE = "\n\nLiteLLM: model group 'demo' failed with the error above. No fallback was attempted."


@pytest.mark.parametrize("status", [None, 400, 500, 503])
@pytest.mark.parametrize(
    ("message", "code", "reason"),
    [
        (
            f"litellm.ContextWindowExceededError: AzureException BadRequestError - {CONTEXT}\nmodel=demo.",
            "context_length_exceeded",
            CONTEXT,
        ),
        (
            f"litellm.BadRequestError: litellm.ContentPolicyViolationError: Your request was rejected.{MORE}",
            "content_policy_violation",
            "Your request was rejected.",
        ),
        (
            "litellm.UnsupportedParamsError: openai does not support parameters: ['verbosity']",
            "unsupported_parameter",
            "openai does not support parameters: ['verbosity']",
        ),
        (
            "litellm.BadRequestError: OpenAIException - Unsupported parameter: 'max_tokens' is not supported",
            "unsupported_parameter",
            "Unsupported parameter: 'max_tokens' is not supported",
        ),
        ("litellm.NotFoundError: OpenAIException - No such thing", "model_not_found", "No such thing"),
    ],
)
def test_litellms_exceptions_become_openais_codes(
    status: int | None, message: str, code: str, reason: str
) -> None:
    error = said(status, message)
    assert (error.name, error.code, error.retryable) == ("BadRequestError", code, False)
    assert error.message == f"The model refused the request: {reason}"
    assert (error.upstream_status, error.upstream_code) == (status, code)


def said(status: int | None, message: str, **fields: Any) -> ServiceError:
    """The error for what LiteLLM says in an answer, or in an event of a stream that names no status."""
    if status is not None:
        return translated(status, message, **{"type": "x", "param": None, "code": f"{status}", **fields})
    event = {"message": message, "type": "x", "param": None, "code": None, **fields}
    return from_event(event, {}, {"model": "demo", "messages": []}, known_model=True)


@pytest.mark.parametrize(
    ("status", "message", "fields"),
    [
        (429, f"litellm.RateLimitError: RateLimitError: OpenAIException - {UNPAID}{MORE}", {}),
        (429, "no", {"code": "insufficient_quota"}),
        (429, "no", {"type": "insufficient_quota"}),
        (429, "Your account has insufficient balance", {}),
        (429, "Budget has been exceeded! Current cost: 9", {}),
        (400, "Budget has been exceeded!", {"type": "budget_exceeded"}),
        (400, "litellm.BadRequestError: AnthropicException - Your credit balance is too low to use it.", {}),
        (None, f"litellm.RateLimitError: OpenAIException - {UNPAID}", {}),
        (503, "litellm.MidStreamFallbackError: litellm.RateLimitError: no", {"code": "insufficient_quota"}),
    ],
)
def test_a_spent_quota_is_told_from_a_limit_of_the_rate(
    status: int | None, message: str, fields: dict[str, Any]
) -> None:
    error = said(status, message, **fields)
    assert isinstance(error, RateLimitError)
    assert (error.code, error.upstream_code) == ("insufficient_quota", "insufficient_quota")
    assert (error.retryable, error.transient, error.retry_after_s) == (False, False, None)
    answer = error_response(error, {"path": "/v1/chat/completions"})
    assert answer.headers["X-Should-Retry"] == "false"
    assert "Retry-After" not in answer.headers


@pytest.mark.parametrize(
    ("message", "headers"),
    [
        (f"litellm.RateLimitError: GeminiException - {UNPAID} Please retry in 7.66s.", None),
        (f"litellm.RateLimitError: {UNPAID}", {"Retry-After": "7"}),
        ("litellm.RateLimitError: Rate limit reached for gpt", None),
    ],
)
def test_a_limit_that_ends_by_itself_is_no_spent_quota(message: str, headers: dict[str, str] | None) -> None:
    error = translated(429, message, headers=headers, code="429")
    assert isinstance(error, RateLimitError)
    assert (error.code, error.retryable, error.transient) == ("rate_limit_exceeded", True, True)


def test_a_text_about_money_in_a_refusal_is_no_spent_quota() -> None:
    error = translated(400, "Invalid value: 'insufficient funds'", code="400")
    assert (error.name, error.code) == ("BadRequestError", "invalid_value")


@pytest.mark.parametrize("status", [None, 400, 500])
def test_wrong_credentials_are_ours_with_any_status(status: int | None) -> None:
    error = said(status, "litellm.AuthenticationError: AuthenticationError: OpenAIException - no")
    assert (error.name, error.code, error.retryable) == ("UpstreamError", None, False)
    assert error.upstream_code == "invalid_api_key"


def test_an_event_without_a_status_says_so() -> None:
    error = said(None, "litellm.APIConnectionError: no")
    assert (error.name, error.label, error.upstream_status) == ("UpstreamError", "Error event", None)


@pytest.mark.parametrize(
    ("code", "shown"),
    [("invalid_value", "invalid_value"), ("ALL_NEW", "other"), ("400", None), (5, None), (None, None)],
)
def test_telemetry_gets_a_code_of_a_closed_set(code: object, shown: str | None) -> None:
    assert translated(400, "no", code=code).upstream_code == shown
    assert translated(500, "no", code="all_new").upstream_code == "other"


def test_the_codes_of_openais_library_are_known() -> None:
    codes = get_args(ResponseError.model_fields["code"].annotation)
    assert codes
    assert set(codes) <= CODES


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("0", 0),
        ("7", 7),
        (" 7\t", 7),
        ("007", 7),
        ("7.66", 7.66),
        ("0.05", 0.05),
        ("99999.5", 3_600),
        ("1" * 400 + ".5", 3_600),
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
        "7.",
        ".5",
        "7.6.6",
        "-7.66",
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


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after-ms": "7660", "retry-after": "8"}, 7.66),
        ({"Retry-After-Ms": "99999999"}, 3_600),
        ({"retry-after-ms": "-5", "retry-after": "8"}, 8),
        ({"retry-after-ms": "soon", "retry-after": "soon"}, None),
        # LiteLLM passes its provider's fields on with a prefix.
        ({"llm_provider-retry-after": "7.66"}, 7.66),
        ({"llm_provider-retry-after-ms": "7660", "llm_provider-retry-after": "8"}, 7.66),
    ],
)
@pytest.mark.parametrize("status", [429, 503])
def test_every_field_that_asks_to_wait_is_heard(
    headers: dict[str, str], seconds: float | None, status: int
) -> None:
    assert translated(status, headers=headers).retry_after_s == seconds


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
