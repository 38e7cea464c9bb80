"""OpenAI's protocol: its clients work here by their base URL and their key, which is the token."""

import json

from fastapi import APIRouter, Request
from starlette.responses import Response

from service.clients.llm_answers import Completion
from service.clients.llm_stream import StreamEvent
from service.clients.sse import event
from service.dependencies import GenerationDep, ModelCallDep, ModelCaller
from service.errors import (
    AuthenticationError,
    BadRequestError,
    CircuitOpenError,
    NotFoundError,
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
from service.middleware.errors import OPENAI_PREFIX, openai_error_body
from service.routers.event_stream import EventStream
from service.routers.openai_body import read_chat, read_embeddings
from service.routers.openai_schemas import (
    CHAT_ANSWER,
    CHAT_REQUEST,
    EMBEDDINGS_ANSWER,
    EMBEDDINGS_REQUEST,
    MODEL,
    MODELS,
    openai_errors,
)
from service.services.call_report import Call
from service.utils.disconnect import unless_caller_left

router = APIRouter(prefix=OPENAI_PREFIX, tags=["openai"])

PASSED_HEADERS = ("openai-beta",)
"""What of the caller's header fields reaches the upstream; the rest is for this service."""

JSON = "application/json"
DONE = event(b"[DONE]")

ALWAYS = (AuthenticationError, BadRequestError, RateLimitError, UpstreamError, UpstreamTimeoutError)
UNAVAILABLE = (OverloadedError, ShuttingDownError)
CALL_ERRORS = (
    *(*ALWAYS, RequestTimeoutError, PayloadTooLargeError, ValidationError),
    *(CircuitOpenError, *UNAVAILABLE),
)


class OpenAiWire:
    """A stream in OpenAI's words: the upstream's events as they are.

    Args:
        show_usage: Whether the caller asked for the count of tokens, which the upstream sends in any case.
    """

    def __init__(self, *, show_usage: bool) -> None:
        self._show_usage = show_usage

    def piece(self, event: StreamEvent) -> bytes:
        """The event."""
        return b"" if event.usage_only and not self._show_usage else event.raw

    def done(self, _completion: Completion) -> bytes:
        """What OpenAI's clients stop at."""
        return DONE

    def error(self, error: ServiceError) -> bytes:
        """The error's body as an event; nothing says that the answer is done."""
        return event(json.dumps(openai_error_body(error)).encode())


@router.post(
    "/chat/completions",
    response_class=Response,
    responses={200: CHAT_ANSWER, **openai_errors(*CALL_ERRORS)},
    openapi_extra={"requestBody": CHAT_REQUEST},
)
async def chat_completions(request: Request, user: ModelCaller, asked: ModelCallDep) -> Response:
    """OpenAI's chat completion; the default model answers where none is named.

    What is not known here reaches the model, and what it answers comes back as it is. With `stream` the
    answer comes as server-sent events; a failure after the first of them is an event with an `error`, and
    then there is no `[DONE]`.
    """
    generation = asked.generation
    body = read_chat(await request.body())
    call = Call(
        body.fields,
        body.model or generation.default_model,
        user.username,
        asked.deadline,
        content=body.content,
        headers=_passed(request),
        streamed=body.stream,
        wish=asked.wish,
    )
    if call.streamed:
        wire = OpenAiWire(show_usage=body.wants_usage)
        return EventStream(lambda relay: generation.stream(call, relay), wire, asked.keep_alive_s)
    reply = generation.recall(call)
    if reply is None:
        reply = await unless_caller_left(request.receive, generation.forward(call))
    return Response(reply.content, media_type=JSON)


@router.post(
    "/embeddings",
    response_class=Response,
    responses={200: EMBEDDINGS_ANSWER, **openai_errors(*CALL_ERRORS)},
    openapi_extra={"requestBody": EMBEDDINGS_REQUEST},
)
async def embeddings(request: Request, user: ModelCaller, asked: ModelCallDep) -> Response:
    """OpenAI's embeddings; the model must be named, since the default one chats."""
    body = read_embeddings(await request.body())
    call = Call(
        body.fields,
        str(body.model),
        user.username,
        asked.deadline,
        operation="embeddings",
        content=body.content,
        headers=_passed(request),
    )
    reply = await unless_caller_left(request.receive, asked.generation.forward(call))
    return Response(reply.content, media_type=JSON)


@router.get(
    "/models", response_class=Response, responses={200: MODELS, **openai_errors(*ALWAYS, *UNAVAILABLE)}
)
async def models(_user: ModelCaller, generation: GenerationDep) -> Response:
    """The models on offer, as the upstream lists them."""
    return Response((await generation.models()).content, media_type=JSON)


@router.get(
    "/models/{model:path}",
    response_class=Response,
    responses={200: MODEL, **openai_errors(*ALWAYS, NotFoundError, ValidationError, *UNAVAILABLE)},
)
async def model(model: str, _user: ModelCaller, generation: GenerationDep) -> Response:
    """One of the models on offer."""
    entry = (await generation.models()).entries.get(model)
    if entry is None:
        raise NotFoundError(
            "There is no such model. GET /v1/models lists them.", param="model", code="model_not_found"
        )
    return Response(json.dumps(entry), media_type=JSON)


def _passed(request: Request) -> dict[str, str]:
    # Other than ASCII is nothing that the upstream knows, and cannot be sent.
    given = ((name, request.headers.get(name, "")) for name in PASSED_HEADERS)
    return {name: value for name, value in given if value and value.isascii()}
