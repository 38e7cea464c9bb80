"""The errors that a caller can be answered with, as one closed tree; it imports nothing of this service.

::

    ServiceError
    ├── CallerError                 the request is at fault
    │   ├── BadRequestError         400  the model's side refused the request
    │   ├── AuthenticationError     401  no valid token
    │   ├── PermissionDeniedError   403  the role does not suffice
    │   ├── NotFoundError           404  no such route
    │   ├── MethodNotAllowedError   405  no such method on the route
    │   ├── RequestTimeoutError     408  the body did not arrive in time
    │   ├── PayloadTooLargeError    413  the body is over the limit
    │   ├── UnsupportedMediaTypeError 415 the body is of a type or coding that the route does not read
    │   ├── ValidationError         422  the body is not of the route's shape
    │   ├── RateLimitError          429  too many requests, here or upstream
    │   ├── BudgetExceededError     429  a budget is spent until it is renewed
    │   └── CallerLeftError         499  the caller disconnected (telemetry only)
    ├── UpstreamFailure             the model's side is at fault
    │   ├── UpstreamError           502  it answered 5xx or an invalid body, or broke off
    │   └── UpstreamTimeoutError    504  it did not answer in time, or could not be reached
    ├── UnavailableError            this service declines for the moment
    │   ├── CircuitOpenError        503  the breaker is open
    │   ├── DependencyUnavailableError 503 a store that the answer depends on cannot be reached
    │   ├── OverloadedError         503  too many requests in flight
    │   └── ShuttingDownError       503  draining
    └── InternalError               500  a bug

The name of a class is the ``error`` of the body, and the ``error.type`` of span, metric and log line.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar, Final

PLAIN_FIELD: Final = re.compile(r"[A-Za-z0-9_-]{1,32}(\.[A-Za-z0-9_-]{1,32})*")
"""A field's name that may be logged. Others may be a secret or a prompt in the wrong place."""


class Fault(StrEnum):
    """Who can do something about an error."""

    CALLER = "caller"
    """The request, or how many of them there are."""
    UPSTREAM = "upstream"
    """The model, its provider, or the LiteLLM proxy."""
    CACHE = "cache"
    """The vector store."""
    SERVICE = "service"
    """This service and the stores that it cannot do without."""


class Cause(StrEnum):
    """Why an exchange with the upstream failed below HTTP; a closed set, so it can stand in telemetry."""

    REFUSED = "refused"
    """No connection: the host, or the network on the way to it, turned it down."""
    DNS = "dns"
    """The host's name could not be resolved."""
    TLS = "tls"
    """The TLS handshake failed, for instance because of the certificate."""
    CONNECT_TIMEOUT = "connect_timeout"
    """The connection was not established within the time limit."""
    READ_TIMEOUT = "read_timeout"
    """The connection was established, and the upstream did not send in time."""
    RESET = "reset"
    """The connection was reset or closed before the answer was complete."""
    PROTOCOL = "protocol"
    """What was sent or received is not valid HTTP."""


UNREACHABLE: Final = frozenset({Cause.REFUSED, Cause.DNS, Cause.TLS, Cause.CONNECT_TIMEOUT})
"""The causes that mean that there was no connection at all."""


@dataclass(frozen=True, slots=True)
class ErrorFacts:
    """All that an error's body says, for log lines and for who asks later; nothing of the input is in it.

    Args:
        name: The error's name.
        status: The status that it is answered with.
        message: What happened. A field's name that is not plain is replaced by a question mark.
        fault: Who can do something about it.
        retry: Whether the caller is told to try again.
        retry_after_s: After how many whole seconds, where that is told too.
        code: OpenAI's code.
        param: The field at fault.
        fields: Each field at fault and the rule that it breaks, such as ``body.prompt: string_type``.
        upstream_status: The status of the upstream's answer.
        upstream_code: The code in it; one of a closed set.
        cause: Why the exchange with the upstream failed below HTTP.
    """

    name: str
    status: int
    message: str
    fault: Fault
    retry: bool
    retry_after_s: int | None = None
    code: str | None = None
    param: str | None = None
    fields: tuple[str, ...] = ()
    upstream_status: int | None = None
    upstream_code: str | None = None
    cause: str | None = None


class ServiceError(Exception):
    """An error that carries everything needed to answer the caller.

    Args:
        message: What happened and what to do about it, in plain words. It is shown to the caller, so it
            holds no secret, no prompt and nothing internal. Without it, the class's own sentence.
        retry_after_s: Seconds until a retry makes sense, where the upstream or a limiter named them; becomes
            ``Retry-After``, rounded up. Without it, the class's default applies, if it has one.
        retryable: Whether the caller is advised to try again, where it differs from the class's advice.
        transient: Whether this service itself may try again at once; as ``retryable`` where it is not said.
        label: What happened in two or three words, for the log lines of attempts.
        cause: Why the exchange with the upstream failed below HTTP, where that is what happened.
        details: One entry for each field at fault: ``field``, ``message``, ``type``.
        headers: Additional header fields for the answer.
        param: The field at fault, where one is; for clients that speak OpenAI's protocol.
        code: OpenAI's code for the error, where there is one and it differs from the class's default.
        fault: Who can do something about it, where it differs from the class's.
    """

    status: ClassVar[int] = 500
    at_fault: ClassVar[Fault] = Fault.SERVICE
    meaning: ClassVar[str] = "This service met a bug of its own."
    """What the name means, whatever the message says."""
    advice: ClassVar[str] = "Quote the incident_id to those who operate this service."
    """What the caller can do."""
    default_message: ClassVar[str] = "The service could not handle the request."
    retry: ClassVar[bool] = False
    default_retry_after_s: ClassVar[float | None] = None
    default_code: ClassVar[str | None] = None

    def __init__(  # noqa: PLR0913 - all but the message have defaults
        self,
        message: str | None = None,
        *,
        retry_after_s: float | None = None,
        retryable: bool | None = None,
        transient: bool | None = None,
        label: str | None = None,
        cause: Cause | None = None,
        details: Sequence[Mapping[str, str]] = (),
        headers: Mapping[str, str] | None = None,
        param: str | None = None,
        code: str | None = None,
        fault: Fault | None = None,
    ) -> None:
        self._fault = fault
        self.message = message or self.default_message
        self.retry_after_s = retry_after_s
        self.retryable = self.retry if retryable is None else retryable
        self.transient = self.retryable if transient is None else transient
        self.label = label or type(self).__name__
        self.cause = cause
        self.details = tuple(details)
        self.headers = dict(headers or {})
        self.param = param
        self.code = code or self.default_code
        # What the upstream said, in any case, for telemetry: its status, and one of a closed set of codes.
        self.told = False
        """Whether the upstream's own event has told the caller."""
        self.upstream_status: int | None = None
        self.upstream_code: str | None = None
        super().__init__(self.message)

    @property
    def name(self) -> str:
        """The error's name in the answer's body and in telemetry."""
        return type(self).__name__

    @property
    def fault(self) -> Fault:
        """Who can do something about it."""
        return self._fault or fault_of(type(self), self.upstream_status)

    @property
    def wait_s(self) -> int | None:
        """The whole seconds of ``Retry-After``; None where the answer has no such field."""
        wait_s = self.retry_after_s
        if wait_s is None and self.retryable:
            wait_s = self.default_retry_after_s
        return None if wait_s is None else max(1, math.ceil(wait_s))

    def facts(self) -> ErrorFacts:
        """All that the error's body says, without anything of the caller's own."""
        message, fields = self.message, []
        for detail in self.details:
            given = detail["field"]
            shown = given if PLAIN_FIELD.fullmatch(given) else "?"
            message = message.replace(given, shown)
            fields.append(f"{shown}: {detail['type']}")
        param = self.param or (self.details[0]["field"] if self.details else None)
        return ErrorFacts(
            self.name,
            self.status,
            message,
            self.fault,
            self.retryable,
            self.wait_s,
            self.code,
            param if param is None or PLAIN_FIELD.fullmatch(param) else "?",
            tuple(fields),
            self.upstream_status,
            self.upstream_code,
            None if self.cause is None else self.cause.value,
        )


def fault_of(kind: "type[ServiceError]", upstream_status: int | None) -> Fault:
    """Who can do something about an error of this class, and with this status of the upstream's answer."""
    if issubclass(kind, RateLimitError) and upstream_status is not None:
        # The provider's limit is that of all callers together.
        return Fault.UPSTREAM
    return kind.at_fault


class CallerError(ServiceError):
    """The request is at fault; sending it again unchanged does not help."""

    at_fault = Fault.CALLER
    status = 400


class BadRequestError(CallerError):
    """The model's side refused the request, for instance an unknown model."""

    meaning = "The model's side refused the request as it is."
    advice = "Change the request: its message says what was refused. The same request is refused again."
    default_message = "The request was refused."


class AuthenticationError(CallerError):
    """The request has no valid token; answered with ``WWW-Authenticate: Bearer`` (RFC 6750, section 3)."""

    meaning = "Nothing that was sent proves who is calling."
    advice = "Send a token or an API key that has not expired and was not revoked."
    status = 401
    default_code = "invalid_api_key"
    default_message = "A valid bearer token is required. Sign in at POST /auth/login."

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message, headers={"WWW-Authenticate": "Bearer"})


class PermissionDeniedError(CallerError):
    """The caller is known, and their role does not suffice."""

    meaning = "The caller is known and may not do this."
    advice = "Use another model or key, or ask an administrator."
    status = 403
    default_message = "Your role does not permit this."


class NotFoundError(CallerError):
    """There is no such route."""

    meaning = "There is no such route, or nothing of that name."
    advice = "Compare the path and the id with GET /docs."
    status = 404
    default_message = "There is nothing at this path. GET /docs lists the routes."


class MethodNotAllowedError(CallerError):
    """The route exists and does not take this method."""

    meaning = "The path exists and does not take this method."
    advice = "Use a method that the header Allow names."
    status = 405
    default_message = "This path does not take this method. GET /docs lists the routes."


class RequestTimeoutError(CallerError):
    """The caller's body did not arrive in time."""

    meaning = "The request's body did not arrive within REQUEST_BODY_TIMEOUT_S."
    advice = "Send it again; look for a slow network or a proxy that holds bodies back."
    status = 408
    default_message = "The request's body did not arrive in time. Try again."
    retry = True

    def __init__(self, message: str | None = None) -> None:
        # The rest of the body may still come, and is no request.
        super().__init__(message, headers={"Connection": "close"})


class PayloadTooLargeError(CallerError):
    """The caller's body is over the limit."""

    meaning = "The request's body is over the limit that the message names."
    advice = "Send less, or ask the operator for a higher limit."
    status = 413
    default_message = "The request's body is too large."

    def __init__(self, message: str | None = None) -> None:
        # The rest of the body is not read, so the connection cannot serve another request.
        super().__init__(message, headers={"Connection": "close"})


class UnsupportedMediaTypeError(CallerError):
    """The body is of a content type, character set or content coding that the route does not read."""

    meaning = "The body is of a type or coding that the route does not read."
    advice = "Send what the message asks for."
    status = 415
    default_message = "The body must be JSON in UTF-8, with Content-Type: application/json."


class ValidationError(CallerError):
    """The request is not of the route's shape; ``details`` names each field."""

    meaning = "The request is not of the route's shape."
    advice = "Correct the fields that are named. The same request is refused again."
    status = 422
    default_message = "The request is not valid."


class RateLimitError(CallerError):
    """Too many requests, by this service's limit or by the upstream's."""

    meaning = "Too many calls in a time, by a limit of this service or of the model's provider."
    advice = "Wait for the seconds of Retry-After, then try again more slowly."
    status = 429
    default_code = "rate_limit_exceeded"
    default_message = "Too many requests. Wait for the seconds in Retry-After, then try again."
    retry = True
    default_retry_after_s = 1.0


class BudgetExceededError(CallerError):
    """The budget of the caller's key, user or team is spent; ``Retry-After`` says when it is renewed."""

    meaning = "The budget of the key, the user or the team is spent."
    advice = "Wait for its renewal, or ask an administrator for more."
    status = 429
    # OpenAI's own word for it: its clients show it, and tools do not try again.
    default_code = "insufficient_quota"
    default_message = "The budget is spent until it is renewed."


class CallerLeftError(CallerError):
    """The caller closed the connection; nothing is sent, and telemetry shows the status that nginx uses."""

    meaning = "The caller closed the connection before the whole answer was sent."
    advice = "Look at the client's own time limit, and at proxies in between."
    status = 499
    default_message = "The caller left before the answer."


class UpstreamFailure(ServiceError):  # noqa: N818 - a branch of the tree, never raised itself
    """The model's side is at fault."""

    at_fault = Fault.UPSTREAM
    status = 502


class UpstreamError(UpstreamFailure):
    """The upstream answered 5xx or an invalid body, broke the connection, or refused our credentials."""

    meaning = "The model's side failed, answered nonsense, or refused this service's own credentials."
    advice = "Try again where that is advised; the attempts below say what each of them met."
    default_message = "The model's side failed. Try again."
    retry = True


class UpstreamTimeoutError(UpstreamFailure):
    """The upstream did not answer within the deadline, or could not be reached at all."""

    meaning = "The model's side did not answer in time, or could not be reached at all."
    advice = "Try again where that is advised; ask for a shorter answer if it was still working."
    status = 504
    default_message = "The model did not answer in time. Try again."
    retry = True


class UnavailableError(ServiceError):
    """This service declines for the moment; ``Retry-After`` says for how long."""

    status = 503
    retry = True
    default_retry_after_s = 1.0


class CircuitOpenError(UnavailableError):
    """The breaker is open; the upstream was not asked."""

    at_fault = Fault.UPSTREAM
    meaning = "Calls kept failing, so the model's side was not asked at all."
    advice = "Wait for the seconds of Retry-After. The errors before this one say why."
    default_message = "The model's side keeps failing, so it is not being asked. Try again later."


class DependencyUnavailableError(UnavailableError):
    """A store without which the request cannot be decided cannot be reached."""

    meaning = "A store that the answer depends on could not be reached."
    advice = "Try again later. GET /health/detailed and the log name the store."
    default_message = "Something that this request needs cannot be reached at the moment. Try again later."


class OverloadedError(UnavailableError):
    """Too many requests are in flight."""

    meaning = "Too many requests are in flight, of this caller or in all."
    advice = "Try again with fewer requests at the same time."
    default_message = "Too many requests are in flight. Try again later."


class ShuttingDownError(UnavailableError):
    """This process is draining."""

    meaning = "The process that was asked is stopping."
    advice = "Try again at once: another process answers."
    default_message = "This process is stopping. Try again; another one will answer."

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message, headers={"Connection": "close"})


class InternalError(ServiceError):
    """A bug in this service."""

    default_message = "An unexpected error happened here. Quote the incident_id when you report it."


PUBLIC_ERRORS: tuple[type[ServiceError], ...] = (
    BadRequestError,
    AuthenticationError,
    PermissionDeniedError,
    NotFoundError,
    MethodNotAllowedError,
    RequestTimeoutError,
    PayloadTooLargeError,
    UnsupportedMediaTypeError,
    ValidationError,
    RateLimitError,
    BudgetExceededError,
    UpstreamError,
    UpstreamTimeoutError,
    CircuitOpenError,
    DependencyUnavailableError,
    OverloadedError,
    ShuttingDownError,
    InternalError,
)
"""Every error that a caller can be answered with, in the order of the tree."""

ERRORS_BY_NAME: Final[Mapping[str, type[ServiceError]]] = {
    error.__name__: error for error in (*PUBLIC_ERRORS, CallerLeftError)
}
"""Every error that a log line or a record can name."""
