"""The one place where an error becomes an answer, for every error of every route."""

import logging
import math
from collections.abc import Mapping
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from opentelemetry import trace
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.config.logging import current_request, timestamp
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


def answer(error: Exception) -> JSONResponse:
    """The answer to an exception; marks the request, and logs what is a bug with its stack trace."""
    found = as_service_error(error)
    if isinstance(found, InternalError):
        logger.error("Unhandled exception", exc_info=error, extra={"error": found.name})
    request = current_request.get()
    if request is not None:
        request.error = found.name
    headers = dict(found.headers)
    wait_s = found.default_retry_after_s if found.retry_after_s is None else found.retry_after_s
    if wait_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(wait_s)))
    return JSONResponse(error_body(found), status_code=found.status, headers=headers)


async def handle(_request: Request, error: Exception) -> JSONResponse:
    """Answer what a route, a dependency or the routing raised; FastAPI calls it."""
    return answer(error)


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
            response = answer(error)
            if started:
                trace.get_current_span().set_status(trace.StatusCode.ERROR)
            else:
                await response(scope, receive, send)
