"""OpenAI's protocol: its clients work here by their base URL and their key, which is the token."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from fastapi import APIRouter, Request
from starlette.responses import Response

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
from service.routers.schemas import (
    CHAT_ANSWER,
    CHAT_REQUEST,
    EMBEDDINGS_ANSWER,
    EMBEDDINGS_REQUEST,
    MODEL,
    MODEL_NAME,
    MODELS,
    openai_errors,
)
from service.routers.streaming import EventStream
from service.services.call_report import Call
from service.upstream.messages import Completion
from service.upstream.stream import StreamEvent, event
from service.utils.disconnect import cancel_on_disconnect

MAX_DEPTH = 100
"""Deepest nesting of a request; the schema of a tool needs a few dozen."""

_MODEL_NAME = re.compile(MODEL_NAME)


@dataclass(frozen=True)
class JsonBody:
    """A request's body: as it was written, and parsed."""

    content: bytes
    fields: Mapping[str, Any]

    @property
    def model(self) -> str | None:
        """The model that is asked for; None when none is named."""
        model = self.fields.get("model")
        return None if model is None else str(model)

    @property
    def stream(self) -> bool:
        """Whether the answer is wanted in pieces."""
        return self.fields.get("stream") is True

    @property
    def wants_usage(self) -> bool:
        """Whether a stream is to end with the count of its tokens."""
        options = self.fields.get("stream_options")
        return isinstance(options, dict) and options.get("include_usage") is True


def read_chat(content: bytes) -> JsonBody:
    """A chat completion's request; ``ValidationError`` where it cannot be one."""
    body = _read(content)
    messages = body.fields.get("messages")
    if not isinstance(messages, list) or not messages:
        _refuse("messages", "must be a list with at least one message")
    if not all(isinstance(message, dict) for message in messages):
        _refuse("messages", "must be a list of objects")
    if not isinstance(body.fields.get("stream"), bool | None):
        _refuse("stream", "must be true or false")
    options = body.fields.get("stream_options")
    if not isinstance(options, dict | None):
        _refuse("stream_options", "must be an object")
    if options is not None and not isinstance(options.get("include_usage"), bool | None):
        _refuse("stream_options.include_usage", "must be true or false")
    return body


def read_embeddings(content: bytes) -> JsonBody:
    """An embeddings request; ``ValidationError`` where it cannot be one."""
    body = _read(content)
    if body.model is None:
        _refuse("model", "must name a model")
    given = body.fields.get("input")
    if not isinstance(given, (str, list)) or not given:
        _refuse("input", "must be a text, or a list that is not empty")
    return body


def _read(content: bytes) -> JsonBody:
    try:
        fields = json.loads(content.decode(), parse_constant=_no_number, parse_float=_finite)
    except (ValueError, RecursionError):
        _refuse("body", "cannot be read as JSON", kind="json_invalid")
    if not isinstance(fields, dict):
        _refuse("body", "must be a JSON object")
    if _too_deep(content, fields):
        _refuse("body", f"must not be nested more than {MAX_DEPTH} deep")
    model = fields.get("model")
    if model is not None and not (isinstance(model, str) and _MODEL_NAME.fullmatch(model)):
        _refuse("model", "must be the name of a model: up to 200 printable ASCII characters")
    return JsonBody(content, fields)


def _no_number(text: str) -> NoReturn:
    """Refuse what Python's parser takes and no JSON can say."""
    raise ValueError(text)


def _finite(text: str) -> float:
    """A number that can be written again."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def _too_deep(content: bytes, value: object) -> bool:
    if content.count(b"[") + content.count(b"{") <= MAX_DEPTH:
        return False
    level: list[object] = [value]
    for _ in range(MAX_DEPTH):
        inner = [item for item in level if isinstance(item, (dict, list))]
        level = [child for item in inner for child in (item.values() if isinstance(item, dict) else item)]
        if not level:
            return False
    return any(isinstance(item, (dict, list)) for item in level)


def _refuse(field: str, problem: str, kind: str = "value_error") -> NoReturn:
    message = f"The request is not valid: {field}: {problem}"
    raise ValidationError(message, details=[{"field": field, "message": problem, "type": kind}])


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
        reply = await cancel_on_disconnect(request.receive, generation.forward(call))
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
    reply = await cancel_on_disconnect(request.receive, asked.generation.forward(call))
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
