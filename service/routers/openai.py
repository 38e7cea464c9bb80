"""OpenAI's protocol under ``/v1``: its clients need this base URL, and the token as their API key."""

import json
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from typing import Any, Final

from fastapi import APIRouter, Request
from starlette.responses import Response

from service.dependencies import ModelCallDep, ModelCaller, ServicesDep
from service.errors import NotFoundError, ServiceError, ValidationError
from service.middleware.errors import OPENAI_PREFIX, openai_error_body
from service.routers.bodies import MAX_INPUT_VALUES, CallRoute, json_content, refuse
from service.routers.calls import (
    ALWAYS,
    CALL_ERRORS,
    JSON,
    UNAVAILABLE,
    JsonBody,
    call_bytes,
    call_form,
    call_operation,
    check_named,
    read_fields,
)
from service.routers.schemas import (
    CHAT_ANSWER,
    CHAT_REQUEST,
    COMPLETIONS_ANSWER,
    COMPLETIONS_REQUEST,
    EMBEDDINGS_ANSWER,
    EMBEDDINGS_REQUEST,
    IMAGES_ANSWER,
    IMAGES_REQUEST,
    MODEL,
    MODELS,
    MODERATIONS_ANSWER,
    MODERATIONS_REQUEST,
    RERANK_ANSWER,
    RERANK_REQUEST,
    SPEECH_ANSWER,
    SPEECH_REQUEST,
    TRANSCRIPTION_ANSWER,
    TRANSCRIPTION_REQUEST,
    check_response_format,
    openai_errors,
)
from service.routers.streaming import EventStream
from service.services.call_report import CallOutcome
from service.upstream.messages import Completion
from service.upstream.operations import MAX_CHOICES
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


def read_chat(content: bytes, passed: AbstractSet[str]) -> JsonBody:
    """A chat completion's request; ``ValidationError`` where it cannot be one.

    Args:
        content: The body.
        passed: Fields of LiteLLM's own that may be sent.
    """
    body = read_fields(content, passed)
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
        # LiteLLM makes items of Responses of these: one without its content is looked up by its id, whosever
        # it is.
        reasonings = message.get("reasoning_items") or ()
        if not isinstance(reasonings, list | tuple) or not _have(reasonings, "encrypted_content"):
            refuse(f"messages.{number}.reasoning_items", "must be a list of objects, each with its content")
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
    body = read_fields(content, passed, MAX_INPUT_VALUES)
    given = body.fields.get("input")
    if not isinstance(given, (str, list)) or not given:
        refuse("input", "must be a text, or a list that is not empty")
    return body


router = APIRouter(prefix=OPENAI_PREFIX, tags=["openai"], route_class=CallRoute)

DONE = event(b"[DONE]")


class OpenAiFormat:
    """The events of a stream in OpenAI's format, which are the upstream's as they are, and ``[DONE]``.

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


def openai_format(body: JsonBody) -> OpenAiFormat:
    """The format of a request's stream."""
    return OpenAiFormat(show_usage=body.wants_usage)


class ResponsesFormat:
    """The typed events of a response, of images and of audio, as the upstream has sent them."""

    def __init__(self) -> None:
        self._number = -1

    def piece(self, event: StreamEvent) -> bytes:
        """The event, as it is."""
        number = (event.payload or {}).get("sequence_number")
        self._number = number if type(number) is int else self._number + 1
        return event.raw

    def done(self, _completion: Completion, _outcome: CallOutcome) -> bytes:
        """Nothing: an event of the upstream's has ended the stream."""
        return b""

    def error(self, error: ServiceError) -> bytes:
        """An event of the type ``error``, which OpenAI's libraries raise."""
        said = openai_error_body(error)["error"]
        # The facts that the protocol does not know stand beside those that it does.
        fields = {**said, "type": "error", "error": said, "sequence_number": self._number + 1}
        fields["code"] = said["code"] or said["type"]
        return event(json.dumps(fields).encode(), "error")


@router.post(
    "/completions",
    response_class=Response,
    responses={200: COMPLETIONS_ANSWER, **openai_errors(*CALL_ERRORS)},
    openapi_extra={"requestBody": COMPLETIONS_REQUEST},
)
async def completions(request: Request, call: ModelCallDep) -> Response:
    """OpenAI's older completion of a text, whole or as a stream."""
    return await call_operation(request, call, "completions", openai_format)


@router.post(
    "/moderations",
    response_class=Response,
    responses={200: MODERATIONS_ANSWER, **openai_errors(*CALL_ERRORS)},
    openapi_extra={"requestBody": MODERATIONS_REQUEST},
)
async def moderations(request: Request, call: ModelCallDep) -> Response:
    """OpenAI's moderation; `omni-moderation-latest` answers where no model is named."""
    return await call_operation(request, call, "moderations", openai_format)


@router.post(
    "/images/generations",
    response_class=Response,
    responses={200: IMAGES_ANSWER, **openai_errors(*CALL_ERRORS)},
    openapi_extra={"requestBody": IMAGES_REQUEST},
)
async def images(request: Request, call: ModelCallDep) -> Response:
    """OpenAI's images, whole or as typed events; the model must be named, since the default one chats."""
    return await call_operation(request, call, "images", lambda _body: ResponsesFormat())


@router.post(
    "/rerank",
    response_class=Response,
    responses={200: RERANK_ANSWER, **openai_errors(*CALL_ERRORS)},
    openapi_extra={"requestBody": RERANK_REQUEST},
)
async def rerank(request: Request, call: ModelCallDep) -> Response:
    """Cohere's ranking of documents, as LiteLLM offers it; the model must be named."""
    return await call_operation(request, call, "rerank", openai_format)


@router.post(
    "/audio/speech",
    response_class=Response,
    responses={200: SPEECH_ANSWER, **openai_errors(*CALL_ERRORS)},
    openapi_extra={"requestBody": SPEECH_REQUEST},
)
async def speech(request: Request, call: ModelCallDep) -> Response:
    """OpenAI's speech of a text, as the bytes of a recording; the model must be named.

    A failure after the first byte breaks the connection: a recording has no place for an error.
    """
    return await call_bytes(request, call, "speech", ResponsesFormat())


@router.post(
    "/audio/transcriptions",
    response_class=Response,
    responses={200: TRANSCRIPTION_ANSWER, **openai_errors(*CALL_ERRORS)},
    openapi_extra={"requestBody": TRANSCRIPTION_REQUEST},
)
async def transcriptions(request: Request, call: ModelCallDep) -> Response:
    """The text of a recording; the form is passed on as it arrives, once its field `model` is there.

    So a recording of any size up to `MAX_UPLOAD_BYTES` can be sent where `model` stands before `file`;
    otherwise one of `MAX_V1_BODY_BYTES`.
    """
    return await call_form(request, call, "transcriptions", ResponsesFormat())


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
    asked = body.as_request(request, call, "chat")
    spec = call.spec(asked, streamed=body.stream)
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
    check_named(body, request)
    asked = body.as_request(request, call, "embeddings")
    spec = call.spec(asked)
    answer = await cancel_on_disconnect(request.receive, generation.answer(spec))
    return Response(answer.reply.content, media_type=JSON)


@router.get(
    "/models", response_class=Response, responses={200: MODELS, **openai_errors(*ALWAYS, *UNAVAILABLE)}
)
async def models(user: ModelCaller, services: ServicesDep) -> Response:
    """The models on offer, as the upstream lists them; those that the caller may ask."""
    listed = (await services.generation.models()).only(user.models)
    return Response(listed.content, media_type=JSON)


@router.get(
    "/models/{model:path}",
    response_class=Response,
    responses={200: MODEL, **openai_errors(*ALWAYS, NotFoundError, ValidationError, *UNAVAILABLE)},
)
async def model(model: str, user: ModelCaller, services: ServicesDep) -> Response:
    """One of the models on offer, if the caller may ask it."""
    entry = (await services.generation.models()).only(user.models).entries.get(model)
    if entry is None:
        raise NotFoundError(
            "There is no such model. GET /v1/models lists them.", param="model", code="model_not_found"
        )
    return Response(json.dumps(entry), media_type=JSON)
