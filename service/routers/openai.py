"""OpenAI's protocol under ``/v1``: its clients need this base URL, and the token as their API key."""

import json
import re
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, Final

from fastapi import APIRouter, Request
from starlette.responses import Response

from service.dependencies import ModelCallDep, ModelCaller, ServicesDep
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
    UnsupportedMediaTypeError,
    UpstreamError,
    UpstreamTimeoutError,
    ValidationError,
)
from service.middleware.errors import OPENAI_PREFIX, openai_error_body
from service.routers.bodies import MAX_INPUT_VALUES, MAX_VALUES, json_content, read_json, refuse
from service.routers.schemas import (
    CHAT_ANSWER,
    CHAT_REQUEST,
    EMBEDDINGS_ANSWER,
    EMBEDDINGS_REQUEST,
    MODEL,
    MODEL_NAME,
    MODELS,
    check_response_format,
    openai_errors,
)
from service.routers.streaming import EventStream
from service.services.call_report import CallOutcome
from service.upstream.control_fields import control_field
from service.upstream.messages import MAX_CHOICES, Completion, LlmRequest, Operation, with_fields
from service.upstream.stream import StreamEvent, event
from service.utils.disconnect import cancel_on_disconnect

NUMBER: Final = (int, float)
CHAT_FIELDS: Final[Mapping[str, tuple[type | tuple[type, ...], str]]] = {
    "stream": (bool, "must be true or false"),
    "stream_options": (dict, "must be an object"),
    "tools": (list, "must be a list"),
    "functions": (list, "must be a list"),
    "tool_choice": ((str, dict), "must be a text or an object"),
    "response_format": (dict, "must be an object"),
    "logit_bias": (dict, "must be an object"),
    "web_search_options": (dict, "must be an object"),
    "thinking": (dict, "must be an object"),
    "stop": ((str, list), "must be a text or a list"),
    "n": (int, "must be a whole number"),
    "max_tokens": (NUMBER, "must be a number"),
    "max_completion_tokens": (NUMBER, "must be a number"),
    "temperature": (NUMBER, "must be a number"),
    "top_p": (NUMBER, "must be a number"),
    "frequency_penalty": (NUMBER, "must be a number"),
    "presence_penalty": (NUMBER, "must be a number"),
}
"""The types of fields that make LiteLLM fail with 500 when they have another one, as tried with it."""

MAX_INTEGER: Final = 2**63 - 1
"""OTLP and most JSON parsers of providers have no larger integer."""

_MODEL_NAME = re.compile(MODEL_NAME)


@dataclass(frozen=True)
class JsonBody:
    """A request's body, as bytes and parsed."""

    content: bytes
    fields: Mapping[str, Any]

    def as_request(self, operation: Operation, default_model: str, headers: Mapping[str, str]) -> LlmRequest:
        """The request for the upstream, in the caller's bytes, with the default model where none is named."""
        named = self.fields.get("model")
        model = default_model if named is None else str(named)
        content = with_fields(self.fields, self.content, {"model": model} if named is None else {})
        return LlmRequest(operation, model, {**self.fields, "model": model}, content, headers, verbatim=True)

    @property
    def stream(self) -> bool:
        """Whether the caller asks for a stream."""
        return self.fields.get("stream") is True

    @property
    def wants_usage(self) -> bool:
        """Whether the caller asks for token counts at the end of the stream."""
        options = self.fields.get("stream_options")
        return isinstance(options, dict) and options.get("include_usage") is True


def read_chat(content: bytes, passed: AbstractSet[str]) -> JsonBody:
    """A chat completion's request; ``ValidationError`` where it cannot be one.

    Args:
        content: The body.
        passed: Fields of LiteLLM's own that may be sent.
    """
    body = _read(content, passed)
    messages = body.fields.get("messages")
    if not isinstance(messages, list) or not messages:
        refuse("messages", "must be a list with at least one message")
    if not all(isinstance(message, dict) for message in messages):
        refuse("messages", "must be a list of objects")
    for number, message in enumerate(messages):
        # LiteLLM answers these with 500, as if it had failed itself.
        given = message.get("content")
        if not isinstance(given, str | list | None):
            refuse(f"messages.{number}.content", "must be a text or a list of parts")
        if isinstance(given, list) and not _have(given, "type"):
            refuse(f"messages.{number}.content", "must be a list of objects, each with a type")
        if not isinstance(message.get("tool_calls"), list | None):
            refuse(f"messages.{number}.tool_calls", "must be a list")
    _check_types(body.fields)
    _check_shapes(body.fields)
    options = body.fields.get("stream_options")
    if options is not None and not isinstance(options.get("include_usage"), bool | None):
        refuse("stream_options.include_usage", "must be true or false")
    return body


def _check_types(fields: Mapping[str, Any]) -> None:
    for name, (kind, problem) in CHAT_FIELDS.items():
        value = fields.get(name)
        if value is not None and (
            not isinstance(value, kind) or isinstance(value, bool) is not (kind is bool)
        ):
            refuse(name, problem)
        if isinstance(value, int) and abs(value) > MAX_INTEGER:
            refuse(name, "must be a number of at most 64 bits")


def _check_shapes(fields: Mapping[str, Any]) -> None:
    """Refuse fields of the right type whose parts make LiteLLM fail with 500, for some of its providers."""
    for name, key in (("tools", "type"), ("functions", "name")):
        if not _have(fields.get(name) or (), key):
            refuse(name, f"must be a list of objects, each with a {key}")
    choices, shape = fields.get("n"), fields.get("response_format")
    # LiteLLM's mock makes as many as are asked for, until there is no memory left.
    if choices is not None and not 1 <= choices <= MAX_CHOICES:
        refuse("n", f"must be from 1 to {MAX_CHOICES}")
    if shape is not None:
        try:
            check_response_format(shape)
        except ValueError as error:
            refuse("response_format", str(error))


def _have(entries: Iterable[object], key: str) -> bool:
    """Whether each of the entries is an object with a text under this key."""
    return all(isinstance(entry, dict) and isinstance(entry.get(key), str) for entry in entries)


def read_embeddings(content: bytes, passed: AbstractSet[str]) -> JsonBody:
    """An embeddings request; ``ValidationError`` where it cannot be one. Arguments as ``read_chat``'s."""
    body = _read(content, passed, MAX_INPUT_VALUES)
    if body.fields.get("model") is None:
        refuse("model", "must name a model")
    given = body.fields.get("input")
    if not isinstance(given, (str, list)) or not given:
        refuse("input", "must be a text, or a list that is not empty")
    return body


def _read(content: bytes, passed: AbstractSet[str], max_values: int = MAX_VALUES) -> JsonBody:
    fields = read_json(content, max_values)
    if not isinstance(fields, dict):
        refuse("body", "must be a JSON object")
    field = control_field(fields.keys(), passed)
    if field is not None:
        refuse(field[:100], "is LiteLLM's own, and not permitted here")
    model = fields.get("model")
    if model is not None and not (isinstance(model, str) and _MODEL_NAME.fullmatch(model)):
        refuse("model", "must be the name of one model: up to 200 printable ASCII characters, no comma")
    return JsonBody(content, fields)


router = APIRouter(prefix=OPENAI_PREFIX, tags=["openai"])

PASSED_HEADERS = ("openai-beta",)
"""The caller's header fields that are sent to the upstream; no others are."""

JSON = "application/json"
DONE = event(b"[DONE]")

ALWAYS = (AuthenticationError, BadRequestError, RateLimitError, UpstreamError, UpstreamTimeoutError)
UNAVAILABLE = (OverloadedError, ShuttingDownError)
CALL_ERRORS = (
    *(*ALWAYS, RequestTimeoutError, PayloadTooLargeError, UnsupportedMediaTypeError, ValidationError),
    *(CircuitOpenError, *UNAVAILABLE),
)


class OpenAiFormat:
    """The events of a stream in OpenAI's format, which are the upstream's as they are.

    Args:
        show_usage: Whether the caller asked for the token counts, which the upstream sends in any case.
    """

    def __init__(self, *, show_usage: bool) -> None:
        self._show_usage = show_usage

    def piece(self, event: StreamEvent) -> bytes:
        """The event; nothing for token counts that the caller did not ask for."""
        return b"" if event.usage_only and not self._show_usage else event.raw

    def done(self, _completion: Completion, _outcome: CallOutcome) -> bytes:
        """The event at which OpenAI's clients stop."""
        return DONE

    def error(self, error: ServiceError) -> bytes:
        """The error's body as an event; no ``[DONE]`` follows."""
        return event(json.dumps(openai_error_body(error)).encode())


@router.post(
    "/chat/completions",
    response_class=Response,
    responses={200: CHAT_ANSWER, **openai_errors(*CALL_ERRORS)},
    openapi_extra={"requestBody": CHAT_REQUEST},
)
async def chat_completions(request: Request, call: ModelCallDep) -> Response:
    """OpenAI's chat completion; the default model answers where none is named.

    Fields that are not known here reach the model, and its answer comes back unchanged. With `stream` the
    answer comes as server-sent events; a failure after the first of them is an event with an `error`, and no
    `[DONE]` follows it.

    The answer may come from the cache where `temperature` is 0, `seed` is set, or the header
    `Cache-Control: max-age=…` names the age of an answer that will do. `X-Cache` says whether it did.
    """
    generation = call.services.generation
    body = read_chat(await json_content(request), call.services.pass_litellm_fields)
    spec = call.spec(
        body.as_request("chat", generation.default_model, _passed_headers(request)), streamed=body.stream
    )
    if body.stream:
        return EventStream(
            generation.stream(spec),
            OpenAiFormat(show_usage=body.wants_usage),
            call.services.stream_times,
        )
    answer = await cancel_on_disconnect(request.receive, generation.answer(spec))
    return Response(answer.reply.content, media_type=JSON)


@router.post(
    "/embeddings",
    response_class=Response,
    responses={200: EMBEDDINGS_ANSWER, **openai_errors(*CALL_ERRORS)},
    openapi_extra={"requestBody": EMBEDDINGS_REQUEST},
)
async def embeddings(request: Request, call: ModelCallDep) -> Response:
    """OpenAI's embeddings; the model must be named, since the default one chats."""
    generation = call.services.generation
    body = read_embeddings(await json_content(request), call.services.pass_litellm_fields)
    spec = call.spec(body.as_request("embeddings", generation.default_model, _passed_headers(request)))
    answer = await cancel_on_disconnect(request.receive, generation.answer(spec))
    return Response(answer.reply.content, media_type=JSON)


@router.get(
    "/models", response_class=Response, responses={200: MODELS, **openai_errors(*ALWAYS, *UNAVAILABLE)}
)
async def models(_user: ModelCaller, services: ServicesDep) -> Response:
    """The models on offer, as the upstream lists them."""
    return Response((await services.generation.models()).content, media_type=JSON)


@router.get(
    "/models/{model:path}",
    response_class=Response,
    responses={200: MODEL, **openai_errors(*ALWAYS, NotFoundError, ValidationError, *UNAVAILABLE)},
)
async def model(model: str, _user: ModelCaller, services: ServicesDep) -> Response:
    """One of the models on offer."""
    entry = (await services.generation.models()).entries.get(model)
    if entry is None:
        raise NotFoundError(
            "There is no such model. GET /v1/models lists them.", param="model", code="model_not_found"
        )
    return Response(json.dumps(entry), media_type=JSON)


def _passed_headers(request: Request) -> dict[str, str]:
    # The upstream knows no value that is not ASCII, and none can be sent.
    given = ((name, request.headers.get(name, "")) for name in PASSED_HEADERS)
    return {name: value for name, value in given if value and value.isascii()}
