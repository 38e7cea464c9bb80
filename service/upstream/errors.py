"""Translates what the OpenAI SDK raises into this service's errors; nothing else does."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from enum import Enum, auto
from typing import Any, Final, Self

import httpx2
import openai

from service.errors import (
    UNREACHABLE,
    BadRequestError,
    Cause,
    RateLimitError,
    ServiceError,
    UpstreamError,
    UpstreamTimeoutError,
)
from service.upstream.reasons import CODES, GENERAL, CallersText, plain_name, reason_of
from service.upstream.transport import AnswerTooLargeError, TransportCauseError

CONFLICT = 409
TOO_MANY = 429
SERVER_ERRORS = 500
TIMEOUT = "Timeout"
CONNECTION = "Connection error"
MAX_RETRY_AFTER_S = 3_600.0
SECONDS = re.compile(r"[0-9]+(\.[0-9]+)?")
MAX_DIGITS = 16
OTHER_CODE = "other"

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

BY_EXCEPTION: Final[Mapping[str, str]] = {
    "ContextWindowExceededError": "context_length_exceeded",
    "ContentPolicyViolationError": "content_policy_violation",
    "GuardrailRaisedException": "content_policy_violation",
    "BlockedPiiEntityError": "content_policy_violation",
    "BudgetExceededError": "insufficient_quota",
    "AuthenticationError": "invalid_api_key",
    "NotFoundError": "model_not_found",
    "RateLimitError": "rate_limit_exceeded",
    "UnsupportedParamsError": "unsupported_parameter",
}
"""OpenAI's code for each of LiteLLM's exceptions, which stand in the message: LiteLLM puts the status into
``code``. The first one that is named counts."""

BY_SENTENCE: Final[Mapping[re.Pattern[str], str]] = {
    re.compile(said, re.IGNORECASE): code
    for said, code in {
        r"maximum context length|prompt is too long": "context_length_exceeded",
        r"content management policy|safety system": "content_policy_violation",
        r"\bunsupported parameter: ": "unsupported_parameter",
        r"\bunsupported value: ": "unsupported_value",
        r"\bunknown parameter: ": "unknown_parameter",
        r"\binvalid value: ": "invalid_value",
        r"\binvalid type for '": "invalid_type",
        r"\bmissing required parameter: ": "missing_required_parameter",
    }.items()
}
"""OpenAI's code for sentences of OpenAI's whose code LiteLLM has replaced."""

QUOTA_CODES: Final = frozenset({"insufficient_quota", "billing_hard_limit_reached", "billing_not_active"})
QUOTA: Final = re.compile(
    r"exceeded your current quota|insufficient[ _](quota|balance|credits?|funds)"
    r"|budget has been exceeded|billing hard limit|quota[^.]{0,40}\bbilling\b",
    re.IGNORECASE,
)
"""Nobody has paid. A 429 with this wording that says how long to wait is a limit of the rate all the same."""
NO_CREDIT: Final = re.compile(r"\byour credit balance is too low\b", re.IGNORECASE)
"""Anthropic says it with the status 400."""
WAIT_NAMED: Final = re.compile(r"(retry|try again) (in|after) [\d.]+ ?(ms|s|m)", re.IGNORECASE)

ACCOUNT_CODES: Final = frozenset(
    {
        *("account_deactivated", "access_terminated", "invalid_api_key", "invalid_organization"),
        *("organization_deactivated", "invalid_project", "ip_not_authorized"),
        "unsupported_country_region_territory",
    }
)
UPSTREAMS_CODES: Final = (
    QUOTA_CODES
    | ACCOUNT_CODES
    | {
        *("rate_limit_exceeded", "slow_down", "server_error", "engine_overloaded", "vector_store_timeout"),
        *("sanitizer_server_error", "data_residency_mismatch"),
    }
)
"""The codes that are not about the request; all others are."""

RETRY_AFTER_MS: Final = ("retry-after-ms", "llm_provider-retry-after-ms")
RETRY_AFTER: Final = ("retry-after", "llm_provider-retry-after")
"""LiteLLM puts a prefix before its provider's header fields."""


def timed_out(timeout_s: float, cause: Cause | None = None) -> UpstreamTimeoutError:
    """The error for a call that reached its time limit."""
    if cause in UNREACHABLE:
        return UpstreamTimeoutError(
            f"The model's side could not be reached within {timeout_s:g} s. Try again.",
            label=TIMEOUT,
            cause=cause,
        )
    # A repeat would be paid for again, and most likely not be seen either.
    return UpstreamTimeoutError(
        f"The model did not answer within {timeout_s:g} s. A request for less may be answered in time.",
        retryable=False,
        transient=True,
        label=TIMEOUT,
        cause=cause,
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
        retryable=False,
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
            # The limit on a read is what is left until the deadline.
            late = isinstance(error.__cause__, httpx2.ReadTimeout)
            cause = cause_of(error.__cause__)
            return UpstreamTimeoutError(label=TIMEOUT, cause=cause, retryable=not late, transient=True)
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


def status_of(said: Mapping[str, Any]) -> int | None:
    """The status that an error would have had as an answer of its own; None where it does not say.

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
    return None


def _from_status(
    status: int | None,
    body: Mapping[str, Any],
    headers: Mapping[str, str],
    request: Mapping[str, Any],
    *,
    known_model: bool,
) -> ServiceError:
    """The service's error for one of the upstream's; the status is None for an event that names none."""
    wait_s = _asked_wait_s(headers)
    said = _Said.of(body, limited=status == TOO_MANY and wait_s is None)
    status_or_500 = SERVER_ERRORS if status is None else status
    error: ServiceError
    match _fault_of(status_or_500, said, request):
        case Fault.CREDENTIALS:
            error = UpstreamError(
                "The model's side refused this service's credentials.",
                retryable=False,
                label="Credentials refused",
            )
        case Fault.QUOTA:
            error = RateLimitError(
                "The quota of this service at the model's provider is spent. A repeat does not help.",
                retryable=False,
                label="Quota spent",
                code="insufficient_quota",
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
            error = BadRequestError(f"{GENERAL}: one of its fields has a wrong type.", code="invalid_type")
        case Fault.REFUSED:
            error = _refused(said, request, known_model=known_model)
        case Fault.FAILED:
            again = status_or_500 == CONFLICT or status_or_500 >= SERVER_ERRORS
            # Of an event, the error's own name says more than a status that nobody has sent.
            label = "Error event" if status is None else f"HTTP {status}"
            error = UpstreamError(retry_after_s=wait_s, transient=again, label=label)
    error.upstream_status = status
    error.upstream_code = said.code or (OTHER_CODE if said.has_own_code else None)
    return error


class Fault(Enum):
    """What an error of the upstream is about."""

    CREDENTIALS = auto()
    QUOTA = auto()
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


@dataclass(frozen=True)
class _Said:
    """What the upstream says in the body of an error.

    Args:
        body: The error's object.
        text: Its own sentence; below it LiteLLM tells of its fallbacks, and how they failed.
        exceptions: LiteLLM's exceptions that the sentence names.
        code: OpenAI's code for it, if there is one.
    """

    body: Mapping[str, Any]
    text: str
    exceptions: frozenset[str]
    code: str | None

    @classmethod
    def of(cls, body: Mapping[str, Any], *, limited: bool) -> Self:
        """Read a body; ``limited`` says that its status is 429, and nothing says how long to wait."""
        message = body.get("message")
        said = message if isinstance(message, str) else ""
        text = said.strip().split("\n", 1)[0][:JUDGED_CHARS]
        exceptions = frozenset(EXCEPTION.findall(text))
        own, kind = body.get("code"), str(body.get("type"))
        limited = limited or (not own and "RateLimitError" in exceptions)
        unpaid = kind == "budget_exceeded" or kind in QUOTA_CODES or NO_CREDIT.search(text) is not None
        if isinstance(own, str) and own in CODES:
            code: str | None = own
        elif unpaid or (limited and QUOTA.search(text) and not WAIT_NAMED.search(text)):
            code = "insufficient_quota"
        else:
            code = next((code for name, code in BY_EXCEPTION.items() if name in exceptions), None)
            code = code or next((code for said, code in BY_SENTENCE.items() if said.search(text)), None)
        return cls(body, text, exceptions, code)

    @property
    def has_own_code(self) -> bool:
        """Whether the upstream names a code of its own; LiteLLM's is the status."""
        own = self.body.get("code")
        return isinstance(own, str) and bool(own) and not own.isdecimal()

    @property
    def about_the_request(self) -> bool:
        """Whether it is the request's fault, so that it would fail anywhere and at any time."""
        if self.code is not None and self.code not in UPSTREAMS_CODES:
            return True
        return self.body.get("type") == "invalid_request_error" or not REFUSALS.isdisjoint(self.exceptions)


def _fault_of(status: int, said: _Said, request: Mapping[str, Any]) -> Fault:
    """What an error is about: its status says so, except where LiteLLM's status is wrong."""
    fault = BY_STATUS.get(status, Fault.FAILED)
    # LiteLLM without a database answers a wrong key with 400 and this type.
    if said.code in ACCOUNT_CODES or said.body.get("type") == "no_db_connection":
        return Fault.CREDENTIALS
    if fault is not Fault.CREDENTIALS and said.code in QUOTA_CODES:
        return Fault.QUOTA
    if fault is Fault.TIMEOUT and "timeout" in request:
        return Fault.OWN_TIMEOUT
    return _fault_in_500(said) if status >= SERVER_ERRORS else fault


def _fault_in_500(said: _Said) -> Fault:
    if said.about_the_request:
        return Fault.REFUSED
    if WRONG_TYPE.search(said.text):
        return Fault.WRONG_TYPE
    return Fault.RATE if said.code == "rate_limit_exceeded" else Fault.FAILED


def _refused(said: _Said, request: Mapping[str, Any], *, known_model: bool) -> ServiceError:
    message = said.body.get("message")
    text = message.encode("utf-8", "replace").decode() if isinstance(message, str) else ""
    if NO_DEPLOYMENT in text and known_model:
        return UpstreamError("The model has no healthy deployment at the moment. Try again.")
    own = said.body.get("code")
    if own == "model_not_found" or UNKNOWN_MODEL.search(text) or NO_DEPLOYMENT in text:
        return unknown_model(str(request.get("model")))
    caller = CallersText(request)
    return BadRequestError(
        reason_of(text, caller),
        param=plain_name(said.body.get("param"), caller),
        code=said.code or plain_name(own, caller),
    )


def unknown_model(model: str) -> BadRequestError:
    """The error for a model that the upstream does not offer."""
    return BadRequestError(f"Model '{model}' not found", param="model", code="model_not_found")


def _asked_wait_s(headers: Mapping[str, str]) -> float | None:
    """How long the upstream asks to wait, in seconds."""
    for name in RETRY_AFTER_MS:
        if SECONDS.fullmatch(value := headers.get(name, "").strip()):
            return min(float(value[:MAX_DIGITS]) / 1_000, MAX_RETRY_AFTER_S)
    waits = (retry_after(headers.get(name)) for name in RETRY_AFTER)
    return next((wait_s for wait_s in waits if wait_s is not None), None)


def retry_after(value: str | None, now: datetime | None = None) -> float | None:
    """The seconds that a ``Retry-After`` field asks for, bounded; None where it cannot be read.

    It may have either form of RFC 9110, section 10.2.3: a number of seconds, or an HTTP date. Some providers
    send a fraction of a second.
    """
    if value is None:
        return None
    text = value.strip()
    if SECONDS.fullmatch(text):
        return min(float(text[:MAX_DIGITS]), MAX_RETRY_AFTER_S)
    try:
        moment = parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    seconds = (moment - (now or datetime.now(UTC))).total_seconds()
    return min(max(seconds, 0.0), MAX_RETRY_AFTER_S)
