"""Anthropic's protocol under ``/v1/messages``: its clients need this service's URL, and the token as key."""

import json

from fastapi import APIRouter, Request
from starlette.responses import Response

from service.dependencies import FreeCallDep, ModelCallDep
from service.errors import ServiceError
from service.middleware.errors import OPENAI_PREFIX, anthropic_error_body
from service.routers.bodies import CallRoute
from service.routers.calls import CALL_ERRORS, call_operation
from service.routers.schemas import (
    MESSAGES_ANSWER,
    MESSAGES_REQUEST,
    TOKENS_ANSWER,
    TOKENS_REQUEST,
    anthropic_errors,
)
from service.services.call_report import CallOutcome
from service.upstream.messages import Completion
from service.upstream.stream import StreamEvent, event

router = APIRouter(prefix=OPENAI_PREFIX, tags=["anthropic"], route_class=CallRoute)


class MessagesFormat:
    """The events of a message, as the upstream has sent them."""

    def piece(self, event: StreamEvent) -> bytes:
        """The event, as it is."""
        return event.raw

    def done(self, _completion: Completion, _outcome: CallOutcome) -> bytes:
        """Nothing: ``message_stop`` has ended the stream."""
        return b""

    def error(self, error: ServiceError) -> bytes:
        """An event of the type ``error``, which Anthropic's libraries raise."""
        return event(json.dumps(anthropic_error_body(error)).encode(), "error")


@router.post(
    "/messages",
    response_class=Response,
    responses={200: MESSAGES_ANSWER, **anthropic_errors(*CALL_ERRORS)},
    openapi_extra={"requestBody": MESSAGES_REQUEST},
)
async def messages(request: Request, call: ModelCallDep) -> Response:
    """Anthropic's message, whole or as events; the default model answers where none is named.

    Fields that are not known here reach the model, and its answer comes back unchanged. A failure after the
    first event is an event of the type `error`.
    """
    return await call_operation(request, call, "messages", lambda _body: MessagesFormat())


@router.post(
    "/messages/count_tokens",
    response_class=Response,
    responses={200: TOKENS_ANSWER, **anthropic_errors(*CALL_ERRORS)},
    openapi_extra={"requestBody": TOKENS_REQUEST},
)
async def count_tokens(request: Request, call: FreeCallDep) -> Response:
    """The number of tokens that a message's request would have."""
    return await call_operation(request, call, "count_tokens", lambda _body: MessagesFormat())
