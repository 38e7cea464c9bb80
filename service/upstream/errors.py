"""Translates what the OpenAI SDK raises into this service's errors; nothing else does."""

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Final

import httpx2
import openai

from service.errors import (
    BadRequestError,
    Cause,
    RateLimitError,
    ServiceError,
    UpstreamError,
    UpstreamTimeoutError,
)
from service.upstream.reasons import CallersText, plain_name, reason_of
from service.upstream.transport import AnswerTooLargeError, TransportCauseError

CONFLICT = 409
SERVER_ERRORS = 500
TIMEOUT = "Timeout"
CONNECTION = "Connection error"
MAX_RETRY_AFTER_S = 3_600.0

STATUS_FIELDS: Final = ("status_code", "status", "http_status", "code")
STATUS_BY_TYPE: Final = {
    "invalid_request_error": 400,
    "context_length_exceeded": 400,
    "content_policy_violation": 400,
    "content_filter": 400,
    "authentication_error": 401,
    "billing_error": 402,
    "permission_error": 403,
    "not_found_error": 404,
    "model_not_found": 404,
    "timeout_error": 408,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "rate_limit_exceeded": 429,
    "insufficient_quota": 429,
    "overloaded_error": 503,
}
"""The statuses of the error types and codes that OpenAI's and Anthropic's documentation names."""

UNKNOWN_MODEL = re.compile(
    r"invalid model name|model( [`'\"]?[^\s`'\"]+[`'\"]?)? (was )?(not found|does not exist)", re.IGNORECASE
)
NO_DEPLOYMENT = "no healthy deployments"


def timed_out(timeout_s: float, cause: Cause | None = None) -> UpstreamTimeoutError:
    """The error for a call that reached its time limit."""
    return UpstreamTimeoutError(
        f"The model did not answer within {timeout_s:g} s. Try again.", label=TIMEOUT, cause=cause
    )


def invalid_answer() -> UpstreamError:
    """The error for an answer that is not of the protocol's shape."""
    return UpstreamError(
        "The model's side answered with something that is not an answer. Try again.",
        transient=False,
        label="Invalid answer",
    )


def answer_too_large() -> UpstreamError:
    """The error for an answer that is over a limit."""
    return UpstreamError(
        "The model's answer is larger than this service accepts.",
        transient=False,
        label="Answer too large",
    )


def translate(error: openai.APIError, request: Mapping[str, Any], *, known_model: bool) -> ServiceError:
    """The service's error for an SDK error.

    Args:
        error: What the SDK raised.
        request: The body that was sent; none of its texts may appear in the error's message.
        known_model: Whether the upstream has listed the model: then "no deployment" is the upstream's
            failure, not an unknown model.
    """
    match error:
        case openai.APIStatusError():
            body = error.body if isinstance(error.body, dict) else {}
            return _from_status(
                error.status_code, body, error.response.headers, request, known_model=known_model
            )
        case openai.APITimeoutError():
            return UpstreamTimeoutError(label=TIMEOUT, cause=cause_of(error.__cause__))
        case openai.APIConnectionError():
            return from_transport(error.__cause__)
        case _:
            return invalid_answer()


def cause_of(error: BaseException | None) -> Cause | None:
    """The cause that the transport chained to an error; None where there is none."""
    chained = None if error is None else error.__cause__
    return chained.cause if isinstance(chained, TransportCauseError) else None


def from_transport(error: BaseException | None) -> ServiceError:
    """The service's error for a failure of the transport, other than a time limit."""
    match error:
        case httpx2.ConnectError():
            return UpstreamTimeoutError(
                "The model's side cannot be reached. Try again.", label=CONNECTION, cause=cause_of(error)
            )
        case AnswerTooLargeError():
            return answer_too_large()
        case _:
            return UpstreamError(
                "The model's side broke the connection before a whole answer. Try again.",
                label=CONNECTION,
                cause=cause_of(error),
            )


def error_of(answer: Mapping[str, Any], *, is_error: bool = False) -> Mapping[str, Any] | None:
    """What an answer of status 200, or an event of a stream, says about an error; None where it is none.

    Providers write it in three ways: as ``error`` (an object, or a text), as the whole of an event with the
    name ``error``, and as an object whose own type is ``error``.

    Args:
        answer: The answer, or the event's data.
        is_error: Whether the event's name says that it is an error.
    """
    said = answer.get("error")
    is_answer = isinstance(answer.get("choices"), list) or isinstance(answer.get("data"), list)
    if is_answer and isinstance(said, dict) and not any(said.values()):
        # Some send the fields of an error, all of them empty, with each answer.
        said = None
    if isinstance(said, str) and said:
        # Beside a text, the other fields belong to the error too.
        return {**answer, "message": answer.get("message") or said}
    if isinstance(said, dict):
        # The status may stand beside it.
        return {**{name: answer[name] for name in STATUS_FIELDS if name in answer}, **said}
    if said:
        return {}
    if is_error or "error" in (answer.get("object"), answer.get("type")):
        return answer
    return None


def from_event(
    said: Mapping[str, Any], headers: Mapping[str, str], request: Mapping[str, Any], *, known_model: bool
) -> ServiceError:
    """The service's error for an error within an answer of status 200, whole or an event of a stream.

    Args:
        said: What the answer says about the error.
        headers: The answer's header fields; ``Retry-After`` counts.
        request: The body that was sent.
        known_model: As ``translate``'s.
    """
    return _from_status(status_of(said), said, headers, request, known_model=known_model)


def status_of(said: Mapping[str, Any]) -> int:
    """The status that an error would have had as an answer of its own; 500 where it does not say.

    It is a number in one of several fields (LiteLLM sends it as ``code``, as text), or follows from the
    error's type in OpenAI's or Anthropic's protocol.
    """
    for name in STATUS_FIELDS:
        text = str(said.get(name, ""))
        if re.fullmatch(r"[45]\d\d", text):
            return int(text)
    for name in ("code", "type"):
        value = said.get(name)
        if isinstance(value, str) and value in STATUS_BY_TYPE:
            return STATUS_BY_TYPE[value]
    return SERVER_ERRORS


def _from_status(
    status: int,
    body: Mapping[str, Any],
    headers: Mapping[str, str],
    request: Mapping[str, Any],
    *,
    known_model: bool,
) -> ServiceError:
    wait_s = retry_after(headers.get("retry-after"))
    match status:
        case 429:
            return RateLimitError(
                "The model's rate limit is reached. Wait for the seconds in Retry-After, then try again.",
                retry_after_s=wait_s,
                label="Rate limit",
            )
        case 408:
            return UpstreamTimeoutError(label=TIMEOUT)
        case 401 | 402 | 403 | 407:
            return _our_credentials()
        # LiteLLM without a database answers a wrong key with 400 and this type.
        case 400 if body.get("type") == "no_db_connection":
            return _our_credentials()
        case 400 | 404 | 413 | 415 | 422:
            return _refused(body, request, known_model=known_model)
        case _:
            again = status == CONFLICT or status >= SERVER_ERRORS
            return UpstreamError(retry_after_s=wait_s, transient=again, label=f"HTTP {status}")


def _our_credentials() -> UpstreamError:
    return UpstreamError(
        "The model's side refused this service's credentials.", retryable=False, label="Credentials refused"
    )


def _refused(body: Mapping[str, Any], request: Mapping[str, Any], *, known_model: bool) -> ServiceError:
    said = body.get("message")
    text = said.encode("utf-8", "replace").decode() if isinstance(said, str) else ""
    if NO_DEPLOYMENT in text and known_model:
        return UpstreamError("The model has no healthy deployment at the moment. Try again.")
    if body.get("code") == "model_not_found" or UNKNOWN_MODEL.search(text) or NO_DEPLOYMENT in text:
        message = f"Model '{request.get('model')}' not found"
        return BadRequestError(message, param="model", code="model_not_found")
    caller = CallersText(request)
    return BadRequestError(
        reason_of(text, caller),
        param=plain_name(body.get("param"), caller),
        code=plain_name(body.get("code"), caller),
    )


def retry_after(value: str | None, now: datetime | None = None) -> float | None:
    """The seconds that a ``Retry-After`` field asks for, bounded; None where it cannot be read.

    It may have either form of RFC 9110, section 10.2.3: a number of seconds, or an HTTP date.
    """
    if value is None:
        return None
    text = value.strip()
    if text.isascii() and text.isdigit():
        return min(float(text[:9]), MAX_RETRY_AFTER_S)
    try:
        moment = parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    seconds = (moment - (now or datetime.now(UTC))).total_seconds()
    return min(max(seconds, 0.0), MAX_RETRY_AFTER_S)
