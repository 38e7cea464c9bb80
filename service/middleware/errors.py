"""Turns every error of every route into an answer, and puts its name on the server span and the request.

Errors that a route raises reach ``handle_error``, errors of the middleware and of bugs ``ErrorMiddleware``.
Both end in ``error_response``. No other module writes an error body or an error name of a server span.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any, Final

from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from opentelemetry import trace
from opentelemetry.semconv.attributes.error_attributes import ERROR_TYPE
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.config.logging import timestamp
from service.context import current_request
from service.errors import (
    AuthenticationError,
    BadRequestError,
    CallerLeftError,
    InternalError,
    MethodNotAllowedError,
    NotFoundError,
    PayloadTooLargeError,
    PermissionDeniedError,
    ServiceError,
    ValidationError,
)
from service.explain.page import POLICY, error_page
from service.recording.request_key import FORMS
from service.upstream.operations import OPERATIONS
from service.utils.accept import preferred

OPENAI_PREFIX: Final = "/v1"
REQUESTS_PREFIX: Final = "/requests/"
JSON: Final = "application/json"
HTML: Final = "text/html"
MESSAGES: Final = f"{OPENAI_PREFIX}/messages"
UNKNOWN_PATH: Final = (
    "There is nothing at this path. There are: "
    + ", ".join(f"{operation.method} {OPENAI_PREFIX}{operation.path}" for operation in OPERATIONS.values())
    + f", GET {OPENAI_PREFIX}/models."
)
ALLOWED: Final[Mapping[str, str]] = {
    f"{OPENAI_PREFIX}{path}": ", ".join(sorted(row.method for row in OPERATIONS.values() if row.path == path))
    for path in {row.path for row in OPERATIONS.values()}
} | {"/keys": "GET, POST"}
"""The methods of paths with several; the router knows only those of the first of a path's routes."""

ANTHROPIC_TYPES: Final[Mapping[int, str]] = {
    **dict.fromkeys((400, 405, 408, 415, 422), "invalid_request_error"),
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
"""Anthropic's error types by status; all others are ``api_error``."""

MAX_DETAILS = 50
MAX_FIELD_CHARS = 100

BY_STATUS: Mapping[int, type[ServiceError]] = {
    401: AuthenticationError,
    403: PermissionDeniedError,
    404: NotFoundError,
    405: MethodNotAllowedError,
    413: PayloadTooLargeError,
}

logger = logging.getLogger(__name__)


class ErrorMiddleware:
    """Answers errors that are not handled further in, and marks the server span of every failed request.

    An error after the start of an answer cannot be answered any more. The middleware then leaves the answer
    incomplete, so that the server closes the connection and the caller cannot take it for a complete one.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        span, request = trace.get_current_span(), current_request.get()
        started = False

        async def send_marked(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)
            # After the instrumentation, which sets error.type to the status code.
            if message["type"] == "http.response.start" and request is not None and request.error is not None:
                _mark(span, request.error)

        try:
            await self._app(scope, receive, send_marked)
        except Exception as error:  # noqa: BLE001 - the last place that can answer
            if started:
                record_late_error(error)
            else:
                await error_response(error, scope)(scope, receive, send_marked)
        finally:
            # For errors that were recorded after the start of the answer.
            if request is not None and request.error is not None:
                _mark(span, request.error)


async def handle_error(request: Request, error: Exception) -> Response:
    """Answer an error that a route, a dependency or the routing raised; FastAPI's exception handler."""
    return error_response(error, request.scope)


def error_response(error: Exception, scope: Scope) -> Response:
    """Return the answer to an error, in the format of the path's protocol, and record the error."""
    found = as_service_error(error)
    if is_openai_path(scope) and isinstance(error, HTTPException) and isinstance(found, NotFoundError):
        found = NotFoundError(UNKNOWN_PATH)
    record_error(found, error)
    headers = dict(found.headers)
    if found.wait_s is not None:
        headers["Retry-After"] = str(found.wait_s)
    if not found.retryable:
        # OpenAI's client libraries retry 408, 409, 429 and every 5xx unless this field tells them not to.
        headers["X-Should-Retry"] = "false"
    if isinstance(found, MethodNotAllowedError):
        route = getattr(scope.get("route"), "path", "")
        headers.update({"Allow": ALLOWED[route]} if route in ALLOWED else {})
    if wants_page(scope):
        headers |= {"Content-Security-Policy": POLICY, "Vary": "Accept"}
        return HTMLResponse(_page(found, scope), status_code=found.status, headers=headers)
    return JSONResponse(_body_for(scope)(found), status_code=found.status, headers=headers)


def wants_page(scope: Scope) -> bool:
    """Whether a request for what became of another one prefers a page to JSON."""
    path: str = scope["path"].removeprefix(scope.get("root_path", ""))
    if not path.startswith(REQUESTS_PREFIX):
        return False
    return preferred(Headers(scope=scope).get("accept", ""), JSON, HTML) == HTML


def _page(found: ServiceError, scope: Scope) -> str:
    request, path = current_request.get(), str(scope["path"])
    asked = path.rpartition("/")[2]
    return error_page(
        found.facts(),
        type(found),
        request.incident_id if request is not None else "",
        asked if FORMS.fullmatch(asked) else None,
    )


def _body_for(scope: Scope) -> Callable[[ServiceError], dict[str, Any]]:
    """The writer of an error's body in the protocol of a path."""
    if is_anthropic_path(scope):
        return anthropic_error_body
    return openai_error_body if is_openai_path(scope) else error_body


def record_error(found: ServiceError, error: Exception) -> None:
    """Record what an error's body says on the request; log a bug with the stack trace of its exception."""
    if isinstance(found, InternalError):
        logger.error("Unhandled exception", exc_info=error, extra={"error": found.name})
    request = current_request.get()
    if request is not None:
        request.failure = found.facts()


def record_late_error(error: Exception) -> ServiceError:
    """Record an error that happened after the start of an answer, when its status cannot be changed.

    The span is marked at once, because the instrumentation ends it with the last byte of the answer.
    """
    found = as_service_error(error)
    record_error(found, error)
    span = trace.get_current_span()
    span.set_status(trace.StatusCode.ERROR)
    span.set_attribute(ERROR_TYPE, found.name)
    return found


def _mark(span: trace.Span, error: str) -> None:
    """Put the error's name on a server span."""
    if not span.is_recording():
        return
    span.set_attribute(ERROR_TYPE, error)
    if error == CallerLeftError.__name__:
        # The caller has not received the answer, whatever its status.
        span.set_status(trace.StatusCode.ERROR)


def as_service_error(error: Exception) -> ServiceError:
    """Map an exception to the error tree; an unknown exception becomes ``InternalError``."""
    match error:
        # FastAPI wraps every exception that is raised while the body is read.
        case (ServiceError() as found) | HTTPException(__cause__=ServiceError() as found):
            return found
        case ClientDisconnect() | HTTPException(__cause__=ClientDisconnect()):
            return CallerLeftError()
        case RequestValidationError():
            return _validation_error(error)
        # FastAPI raises this for a body that is not JSON.
        case HTTPException(status_code=400):
            problem = {"field": "body", "message": "cannot be read as JSON", "type": "json_invalid"}
            message = "The request is not valid: body: cannot be read as JSON"
            return ValidationError(message, details=[problem])
        case HTTPException() if 400 <= error.status_code < 500:  # noqa: PLR2004 - the range of caller errors
            known = BY_STATUS.get(error.status_code, BadRequestError)()
            known.headers.update(error.headers or {})
            return known
        case _:
            return InternalError()


def _validation_error(error: RequestValidationError) -> ValidationError:
    """Name the invalid fields and the violated rules without repeating the input."""
    details = [
        {
            "field": ".".join(str(part) for part in entry["loc"])[:MAX_FIELD_CHARS],
            "message": entry["msg"],
            "type": entry["type"],
        }
        for entry in error.errors()[:MAX_DETAILS]
    ]
    summary = "; ".join(f"{detail['field']}: {detail['message']}" for detail in details[:3])
    return ValidationError(f"The request is not valid: {summary}", details=details)


def error_body(error: ServiceError) -> dict[str, Any]:
    """Return the body of an error outside ``/v1``."""
    request = current_request.get()
    body: dict[str, Any] = {
        "error": error.name,
        "message": error.message,
        "incident_id": request.incident_id if request else None,
        "request_id": request.request_id if request else None,
        "timestamp": timestamp(),
    }
    if error.details:
        body["details"] = list(error.details)
    return body


def openai_error_body(error: ServiceError) -> dict[str, Any]:
    """Return the body of an error under ``/v1``: OpenAI's fields, and those of ``error_body`` beside them.

    ``type`` is the error's name; ``code`` and ``param`` are OpenAI's own values.
    """
    request = current_request.get()
    param = error.param or (error.details[0]["field"] if error.details else None)
    return {
        "error": {
            "message": error.message,
            "type": error.name,
            "param": param,
            "code": error.code,
            "incident_id": request.incident_id if request else None,
            "request_id": request.request_id if request else None,
            "timestamp": timestamp(),
        }
    }


def anthropic_error_body(error: ServiceError) -> dict[str, Any]:
    """Return the body of an error under ``/v1/messages``: Anthropic's fields, and ours beside them.

    ``error.type`` is Anthropic's own type; ``error.name`` is the error's name everywhere else.
    """
    request = current_request.get()
    said = openai_error_body(error)["error"]
    kind = ANTHROPIC_TYPES.get(error.status, "api_error")
    return {
        "type": "error",
        "error": {**said, "type": kind, "name": error.name},
        "request_id": request.request_id if request else None,
    }


def is_anthropic_path(scope: Scope) -> bool:
    """Whether the path belongs to Anthropic's protocol, which stands within the prefix of OpenAI's."""
    path: str = scope["path"].removeprefix(scope.get("root_path", ""))
    return path == MESSAGES or path.startswith(f"{MESSAGES}/")


def is_openai_path(scope: Scope) -> bool:
    """Whether the path belongs to OpenAI's protocol, which has its own format of errors."""
    path: str = scope["path"].removeprefix(scope.get("root_path", ""))
    return path == OPENAI_PREFIX or path.startswith(f"{OPENAI_PREFIX}/")
