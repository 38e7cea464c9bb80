"""Asking a model, in this service's own shape."""

import json

from fastapi import APIRouter, Request
from starlette.responses import Response

from service.dependencies import GenerationDep, ModelCallDep, ModelCaller
from service.errors import (
    AuthenticationError,
    BadRequestError,
    CircuitOpenError,
    OverloadedError,
    PayloadTooLargeError,
    RateLimitError,
    RequestTimeoutError,
    ServiceError,
    ShuttingDownError,
    UpstreamError,
    UpstreamTimeoutError,
    ValidationError,
)
from service.middleware.errors import error_body
from service.routers.schemas import (
    GENERATED,
    DoneEvent,
    GenerateRequest,
    GenerateResponse,
    ModelsResponse,
    errors,
)
from service.routers.streaming import EventStream
from service.services.call_report import Call
from service.upstream.messages import Completion
from service.upstream.stream import StreamEvent, event
from service.utils.disconnect import cancel_on_disconnect

router = APIRouter(prefix="/llm", tags=["llm"])

UPSTREAM_ERRORS = (BadRequestError, RateLimitError, UpstreamError, UpstreamTimeoutError)
BODY_ERRORS = (RequestTimeoutError, PayloadTooLargeError, ValidationError)
UNAVAILABLE = (OverloadedError, ShuttingDownError)


class TokenWire:
    """A stream in this service's own words: ``token`` for each piece of text, then ``done`` or ``error``.

    Args:
        call: The call.
        request_id: Stands in the last event.
    """

    def __init__(self, call: Call, request_id: str) -> None:
        self._call = call
        self._request_id = request_id

    def piece(self, event_: StreamEvent) -> bytes:
        """A piece of text; the upstream's events without one are its own business."""
        return event(json.dumps({"text": event_.text}).encode(), "token") if event_.text else b""

    def done(self, completion: Completion) -> bytes:
        """What the answer came to."""
        done = DoneEvent.of(completion, self._call.cache, self._request_id)
        return event(done.model_dump_json().encode(), "done")

    def error(self, error: ServiceError) -> bytes:
        """The error's body."""
        return event(json.dumps(error_body(error)).encode(), "error")


@router.post(
    "/generate",
    response_model=GenerateResponse,
    responses={
        200: GENERATED,
        **errors(AuthenticationError, *BODY_ERRORS, *UPSTREAM_ERRORS, CircuitOpenError, *UNAVAILABLE),
    },
)
async def generate(
    body: GenerateRequest, request: Request, user: ModelCaller, asked: ModelCallDep
) -> GenerateResponse | Response:
    """Send a prompt to a model; a caller who closes the connection stops the model's work.

    With `stream` the answer comes as server-sent events: `token` for each piece of text, then `done` with
    what the answer came to, or `error` with an error's body.
    """
    generation = asked.generation
    model = body.model or generation.default_model
    call = Call(body.as_chat(), model, user.username, asked.deadline, streamed=body.stream, wish=asked.wish)
    if call.streamed:
        wire = TokenWire(call, asked.request_id)
        return EventStream(lambda relay: generation.stream(call, relay), wire, asked.keep_alive_s)
    reply = generation.recall(call)
    if reply is None:
        reply = await cancel_on_disconnect(request.receive, generation.forward(call))
    return GenerateResponse.of(reply.completion, call.cache, asked.request_id)


@router.get("/models", responses=errors(AuthenticationError, *UPSTREAM_ERRORS, *UNAVAILABLE))
async def models(_user: ModelCaller, generation: GenerationDep) -> ModelsResponse:
    """The models that LiteLLM offers."""
    listed = await generation.models()
    return ModelsResponse(models=list(listed.names), default_model=generation.default_model)
