"""Translates what the OpenAI SDK raises into this service's errors; nothing else does."""

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from enum import Enum, auto
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
from service.upstream.reasons import GENERAL, CallersText, plain_name, reason_of
from service.upstream.transport import AnswerTooLargeError, TransportCauseError

BAD_REQUEST = 400
CONFLICT = 409
SERVER_ERRORS = 500
TIMEOUT = "Timeout"
CONNECTION = "Connection error"
MAX_RETRY_AFTER_S = 3_600.0

UNKNOWN_MODEL = re.compile(
    r"invalid model name|model( [`'\"]?[^\s`'\"]+[`'\"]?)? (was )?(not found|does not exist)", re.IGNORECASE
)
NO_DEPLOYMENT = "no healthy deployments"

REFUSALS = frozenset(
    {
        *("BadRequestError", "ContextWindowExceededError", "ContentPolicyViolationError"),
        *("UnsupportedParamsError", "UnprocessableEntityError", "InvalidRequestError"),
        *("RejectedRequestError", "LiteLLMUnknownProvider", "ImageFetchError"),
        *("GuardrailRaisedException", "BlockedPiiEntityError"),
    }
)
"""LiteLLM's exceptions about a request. Some reach its caller with the status 500, with the name in the text
only."""

EXCEPTION = re.compile(r"(?<![\w`.])(?:litellm\.)?([A-Z]\w*(?:Error|Exception|Provider))(?!\w)")

WRONG_TYPE = re.compile(
    r"'(?:int|float|bool|str|list|dict)' object (?:is not|has no|does not|doesn't|cannot be) "
    r"|argument after \*\*? must be a mapping, not (?!NoneType)|argument after \* must be an iterable, not"
    r"|type \w+ doesn't define __\w+__|unsupported operand type|not supported between instances of"
    r"|(?:list|string) indices must be integers|unhashable type: '|expected str instance, "
    r"|must be real number|expected string or bytes-like object|can only concatenate "
    r"|dictionary update sequence element"
    r"|could not convert string to float|invalid literal for int|Unsupported response_format type"
    r"|Invalid (?:user|system|assistant|tool) message at index \d"
)
"""Errors of Python's about a field with another type than LiteLLM expects, to which it answers 500. Those
about None are not among them: they are mostly about something missing in a provider's answer."""

JUDGED_CHARS = 2_000


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


def from_event(said: object, request: Mapping[str, Any], *, known_model: bool) -> ServiceError:
    """The service's error for an error that the upstream sends as an event, within a stream."""
    body = said if isinstance(said, dict) else {}
    code = str(body.get("code", ""))
    # LiteLLM sends the status as the code, as text.
    status = int(code) if re.fullmatch(r"[45]\d\d", code) else SERVER_ERRORS
    return _from_status(status, body, {}, request, known_model=known_model)


def _from_status(
    status: int,
    body: Mapping[str, Any],
    headers: Mapping[str, str],
    request: Mapping[str, Any],
    *,
    known_model: bool,
) -> ServiceError:
    wait_s = retry_after(headers.get("retry-after"))
    error: ServiceError
    match _fault_of(status, body, request):
        case Fault.CREDENTIALS:
            error = UpstreamError(
                "The model's side refused this service's credentials.",
                retryable=False,
                label="Credentials refused",
            )
        case Fault.RATE:
            error = RateLimitError(
                "The model's rate limit is reached. Wait for the seconds in Retry-After, then try again.",
                retry_after_s=wait_s,
                label="Rate limit",
            )
        case Fault.TIMEOUT:
            error = UpstreamTimeoutError(label=TIMEOUT)
        case Fault.OWN_TIMEOUT:
            error = BadRequestError(
                "The model did not answer within the request's own time limit.", param="timeout"
            )
        case Fault.WRONG_TYPE:
            error = BadRequestError(f"{GENERAL}: one of its fields has a wrong type.")
        case Fault.REFUSED:
            error = _refused(body, request, known_model=known_model)
        case Fault.FAILED:
            again = status == CONFLICT or status >= SERVER_ERRORS
            error = UpstreamError(retry_after_s=wait_s, transient=again, label=f"HTTP {status}")
    return error


class Fault(Enum):
    """What an error of the upstream is about."""

    CREDENTIALS = auto()
    RATE = auto()
    TIMEOUT = auto()
    OWN_TIMEOUT = auto()
    REFUSED = auto()
    WRONG_TYPE = auto()
    FAILED = auto()


BY_STATUS: Final[Mapping[int, Fault]] = {
    **dict.fromkeys((401, 402, 403, 407), Fault.CREDENTIALS),
    **dict.fromkeys((400, 404, 413, 415, 422), Fault.REFUSED),
    408: Fault.TIMEOUT,
    429: Fault.RATE,
}


def _fault_of(status: int, body: Mapping[str, Any], request: Mapping[str, Any]) -> Fault:
    """What an error is about: its status says so, except where LiteLLM's status is wrong."""
    fault = BY_STATUS.get(status, Fault.FAILED)
    kind, text = body.get("type"), _first_line(body)
    if status == BAD_REQUEST and kind == "no_db_connection":
        # LiteLLM without a database answers a wrong key with this.
        return Fault.CREDENTIALS
    if fault is Fault.TIMEOUT and "timeout" in request:
        return Fault.OWN_TIMEOUT
    if status >= SERVER_ERRORS:
        if kind == "invalid_request_error" or not REFUSALS.isdisjoint(EXCEPTION.findall(text)):
            return Fault.REFUSED
        if WRONG_TYPE.search(text):
            return Fault.WRONG_TYPE
    return fault


def _first_line(body: Mapping[str, Any]) -> str:
    """The upstream's own sentence; below it LiteLLM tells of its fallbacks, and how they failed."""
    said = body.get("message")
    return said.strip().split("\n", 1)[0][:JUDGED_CHARS] if isinstance(said, str) else ""


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
