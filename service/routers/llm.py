"""Asking a model, in this service's own shape."""

from fastapi import APIRouter, Request

from service.dependencies import CurrentUser, GenerationDep, RequestId
from service.errors import (
    AuthenticationError,
    BadRequestError,
    PayloadTooLargeError,
    RateLimitError,
    UpstreamError,
    UpstreamTimeoutError,
    ValidationError,
)
from service.routers.schemas import GenerateRequest, GenerateResponse, ModelsResponse, errors
from service.utils.disconnect import unless_caller_left

router = APIRouter(prefix="/llm", tags=["llm"])

UPSTREAM_ERRORS = (BadRequestError, RateLimitError, UpstreamError, UpstreamTimeoutError)


@router.post(
    "/generate",
    responses=errors(AuthenticationError, PayloadTooLargeError, ValidationError, *UPSTREAM_ERRORS),
)
async def generate(
    body: GenerateRequest,
    request: Request,
    user: CurrentUser,
    generation: GenerationDep,
    request_id: RequestId,
) -> GenerateResponse:
    """Send a prompt to a model; a caller who closes the connection stops the model's work."""
    work = generation.generate(body.as_chat(), user.username)
    completion = await unless_caller_left(request.receive, work)
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


@router.get("/models", responses=errors(AuthenticationError, *UPSTREAM_ERRORS))
async def models(_user: CurrentUser, generation: GenerationDep) -> ModelsResponse:
    """The models that LiteLLM offers."""
    return ModelsResponse(models=list(await generation.models()), default_model=generation.default_model)
