"""Model calls in this service's own format."""

import json

from fastapi import APIRouter, Request
from starlette.responses import Response

from service.dependencies import ModelCallDep, ModelCaller, ServicesDep
from service.errors import (
    AuthenticationError,
    BadRequestError,
    BudgetExceededError,
    CircuitOpenError,
    OverloadedError,
    PayloadTooLargeError,
    PermissionDeniedError,
    RateLimitError,
    RequestTimeoutError,
    ServiceError,
    ShuttingDownError,
    UnsupportedMediaTypeError,
    UpstreamError,
    UpstreamTimeoutError,
    ValidationError,
)
from service.middleware.errors import error_body
from service.routers.bodies import CallRoute
from service.routers.calls import JSON
from service.routers.schemas import (
    GENERATED,
    DoneEvent,
    GenerateRequest,
    GenerateResponse,
    ModelsResponse,
    errors,
)
from service.routers.streaming import EventStream
from service.services.call_report import CallOutcome
from service.upstream.messages import Completion
from service.upstream.stream import StreamEvent, event
from service.utils.disconnect import cancel_on_disconnect

router = APIRouter(prefix="/llm", tags=["llm"], route_class=CallRoute)

UPSTREAM_ERRORS = (BadRequestError, RateLimitError, UpstreamError, UpstreamTimeoutError)
REFUSED = (AuthenticationError, PermissionDeniedError, BudgetExceededError)
BODY_ERRORS = (RequestTimeoutError, PayloadTooLargeError, UnsupportedMediaTypeError, ValidationError)
UNAVAILABLE = (OverloadedError, ShuttingDownError)


class GenerateFormat:
    """The events of a stream in this service's own format: ``token``, then ``done`` or ``error``.

    Args:
        request_id: Stands in the ``done`` event.
    """

    def __init__(self, request_id: str) -> None:
        self._request_id = request_id

    def piece(self, event_: StreamEvent) -> bytes:
        """A piece of text; nothing for an upstream event that holds none."""
        return event(json.dumps({"text": event_.text}).encode(), "token") if event_.text else b""

    def done(self, completion: Completion, outcome: CallOutcome) -> bytes:
        """Model, counts, cost and cache of the whole answer."""
        done = DoneEvent.from_call(completion, outcome, self._request_id)
        return event(done.model_dump_json().encode(), "done")

    def error(self, error: ServiceError) -> bytes:
        """The error's body."""
        return event(json.dumps(error_body(error)).encode(), "error")


@router.post(
    "/generate",
    response_model=GenerateResponse,
    responses={
        200: GENERATED,
        **errors(
            AuthenticationError, *REFUSED, *BODY_ERRORS, *UPSTREAM_ERRORS, CircuitOpenError, *UNAVAILABLE
        ),
    },
)
async def generate(body: GenerateRequest, request: Request, call: ModelCallDep) -> Response:
    """Send a prompt to a model; a caller who closes the connection stops the model's work.

    With `stream` the answer comes as server-sent events: `token` for each piece of text, then `done` with
    the counts and the cost, or `error` with an error's body.
    """
    generation = call.services.generation
    request_ = body.as_request(generation.default_model)
    spec = call.spec(request_, streamed=body.stream, own_protocol=True)
    if body.stream:
        return EventStream(
            generation.stream(spec), GenerateFormat(call.request_id), call.services.stream_times
        )
    answer = await cancel_on_disconnect(request.receive, generation.answer(spec))
    completion = answer.reply.completion
    answered = GenerateResponse.from_call(
        completion, answer.outcome, call.request_id, response=completion.text
    )
    return Response(answered.model_dump_json(), media_type=JSON)


@router.get("/models", responses=errors(AuthenticationError, *UPSTREAM_ERRORS, *UNAVAILABLE))
async def models(user: ModelCaller, services: ServicesDep) -> ModelsResponse:
    """The models that LiteLLM offers, and the caller may ask."""
    listed = (await services.generation.models()).only(user.models)
    return ModelsResponse(models=list(listed.names), default_model=services.generation.default_model)
