"""The one place where an error becomes an answer, for every error of every route."""

import logging
import math
from collections.abc import Mapping
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from opentelemetry import trace
from opentelemetry.semconv.attributes.error_attributes import ERROR_TYPE
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

OPENAI_PREFIX = "/v1"
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


def as_service_error(error: Exception) -> ServiceError:
    """The error of our tree that an exception means; ``InternalError`` where nobody foresaw it."""
    match error:
        # FastAPI wraps whatever goes wrong while the body is read.
        case (ServiceError() as found) | HTTPException(__cause__=ServiceError() as found):
            return found
        case ClientDisconnect() | HTTPException(__cause__=ClientDisconnect()):
            return CallerLeftError()
        case RequestValidationError():
            return _from_validation(error)
        # FastAPI's word for a body that is no JSON at all.
        case HTTPException(status_code=400):
            return _unreadable()
        case HTTPException() if 400 <= error.status_code < 500:  # noqa: PLR2004 - the callers' range
            known = BY_STATUS.get(error.status_code, BadRequestError)()
            known.headers.update(error.headers or {})
            return known
        case _:
            return InternalError()


def _unreadable() -> ValidationError:
    problem = {"field": "body", "message": "cannot be read as JSON", "type": "json_invalid"}
    return ValidationError("The request is not valid: body: cannot be read as JSON", details=[problem])


def _from_validation(error: RequestValidationError) -> ValidationError:
    """Names the fields and the rules; what was sent is not repeated."""
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
    """The body of an error's answer outside ``/v1``; ``details`` only where there are some."""
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
    """The body of an error's answer under ``/v1``: OpenAI's fields, with the same facts beside them.

    ``type`` is the error's name; ``code`` and ``param`` are OpenAI's own words where there are some.
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


def noted(error: Exception) -> ServiceError:
    """The error of our tree, noted on the request; what is a bug is logged with its stack trace."""
    found = as_service_error(error)
    if isinstance(found, InternalError):
        logger.error("Unhandled exception", exc_info=error, extra={"error": found.name})
    request = current_request.get()
    if request is not None:
        request.error = found.name
    return found


def broken_off(error: Exception) -> ServiceError:
    """The same for an error after the head of the answer is out: the status says nothing of it any more."""
    found = noted(error)
    # Now: the instrumentation ends the span with the last byte.
    span = trace.get_current_span()
    span.set_status(trace.StatusCode.ERROR)
    span.set_attribute(ERROR_TYPE, found.name)
    return found


def answer(error: Exception, scope: Scope) -> JSONResponse:
    """The answer to an exception, in the shape of the path's family."""
    found = noted(error)
    headers = dict(found.headers)
    wait_s = found.default_retry_after_s if found.retry_after_s is None else found.retry_after_s
    if wait_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(wait_s)))
    if not speaks_openai(scope):
        return JSONResponse(error_body(found), status_code=found.status, headers=headers)
    if not found.retryable and found.status >= InternalError.status:
        # OpenAI's clients try every 5xx again unless they are told that it is of no use.
        headers["X-Should-Retry"] = "false"
    return JSONResponse(openai_error_body(found), status_code=found.status, headers=headers)


def speaks_openai(scope: Scope) -> bool:
    """Whether the path is of the family that speaks OpenAI's protocol, errors included."""
    path: str = scope["path"].removeprefix(scope.get("root_path", ""))
    return path == OPENAI_PREFIX or path.startswith(f"{OPENAI_PREFIX}/")


async def handle(request: Request, error: Exception) -> JSONResponse:
    """Answer what a route, a dependency or the routing raised; FastAPI calls it."""
    return answer(error, request.scope)


class ErrorMiddleware:
    """Answers what nothing inside has answered, so that no exception reaches the server.

    When a part of the answer is out already, the rest is left out and the server breaks the connection: the
    caller must not take a part for the whole.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def send_and_note(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        except Exception as error:  # noqa: BLE001 - the last place that can answer
            if started:
                broken_off(error)
            else:
                await answer(error, scope)(scope, receive, send)
