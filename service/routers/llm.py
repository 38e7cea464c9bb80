"""Asking a model, in this service's own shape."""

from fastapi import APIRouter, Request

from service.dependencies import CallDeadline, GenerationDep, ModelCaller, RequestId
from service.errors import (
    AuthenticationError,
    BadRequestError,
    CircuitOpenError,
    OverloadedError,
    PayloadTooLargeError,
    RateLimitError,
    RequestTimeoutError,
    UpstreamError,
    UpstreamTimeoutError,
    ValidationError,
)
from service.routers.schemas import GenerateRequest, GenerateResponse, ModelsResponse, errors
from service.services.call_report import Call
from service.utils.disconnect import unless_caller_left

router = APIRouter(prefix="/llm", tags=["llm"])

UPSTREAM_ERRORS = (BadRequestError, RateLimitError, UpstreamError, UpstreamTimeoutError)
BODY_ERRORS = (RequestTimeoutError, PayloadTooLargeError, ValidationError)


@router.post(
    "/generate",
    responses=errors(AuthenticationError, *BODY_ERRORS, *UPSTREAM_ERRORS, CircuitOpenError, OverloadedError),
)
async def generate(
    body: GenerateRequest,
    request: Request,
    user: ModelCaller,
    generation: GenerationDep,
    deadline: CallDeadline,
    request_id: RequestId,
) -> GenerateResponse:
    """Send a prompt to a model; a caller who closes the connection stops the model's work."""
    call = Call(body.as_chat(), body.model or generation.default_model, user.username, deadline)
    completion = await unless_caller_left(request.receive, generation.generate(call))
    return GenerateResponse(
        response=completion.text,
        model=completion.model,
        prompt_tokens=completion.prompt_tokens,
        completion_tokens=completion.completion_tokens,
        total_tokens=completion.total_tokens,
        cost=completion.cost,
        cache="bypass",
        request_id=request_id,
    )


@router.get("/models", responses=errors(AuthenticationError, *UPSTREAM_ERRORS, OverloadedError))
async def models(_user: ModelCaller, generation: GenerationDep) -> ModelsResponse:
    """The models that LiteLLM offers."""
    return ModelsResponse(models=list(await generation.models()), default_model=generation.default_model)
