"""What the routes of model calls under ``/v1`` share: reading a body, and answering it by its operation."""

import re
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import Any, Final

from fastapi import Request
from starlette.responses import Response

from service.context import DEPLOYMENT
from service.dependencies import ModelCall
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
    ShuttingDownError,
    UnsupportedMediaTypeError,
    UpstreamError,
    UpstreamTimeoutError,
    ValidationError,
)
from service.routers.bodies import MAX_VALUES, json_content, read_json, refuse
from service.routers.forms import read_form
from service.routers.schemas import MODEL_NAME
from service.routers.streaming import EventStream, StreamFormat
from service.upstream.control_fields import control_field
from service.upstream.messages import LlmRequest, with_fields
from service.upstream.operations import MAX_CHOICES, OPERATIONS, OperationName
from service.utils.deadline import Deadline
from service.utils.disconnect import cancel_on_disconnect

PASSED_HEADERS: Final = ("openai-beta", "anthropic-version", "anthropic-beta")
"""The caller's header fields that are sent to the upstream; no others are."""

JSON: Final = "application/json"
ALWAYS = (AuthenticationError, BadRequestError, RateLimitError, UpstreamError, UpstreamTimeoutError)
UNAVAILABLE = (OverloadedError, ShuttingDownError)
CALL_ERRORS = (
    *(*ALWAYS, PermissionDeniedError, BudgetExceededError),
    *(RequestTimeoutError, PayloadTooLargeError, UnsupportedMediaTypeError, ValidationError),
    *(CircuitOpenError, *UNAVAILABLE),
)

METADATA: Final = "metadata"
PREVIOUS: Final = "previous_response_id"
STORED_ELSEWHERE: Final[Mapping[str, str]] = {
    PREVIOUS: "is not possible here; POST /v1/responses takes it",
    "conversation": (
        "is not possible here: a conversation that was made elsewhere belongs to no caller of this service. "
        f"Continue a response with {PREVIOUS}"
    ),
}
"""Fields that name what a provider has stored, and what is said where they are refused.

LiteLLM takes them in requests of other protocols too, and hands them to providers of responses. A caller who
names what somebody else has made can read it, by asking the model what was said. A conversation can only be
made with the provider's key, elsewhere, so nothing tells whose it is; to take it for that of the first caller
who uses it would give it to anybody who has learnt its id. ``PASS_LITELLM_FIELDS`` permits it, where all
callers may read each other's.
"""

KINDS: Final[Mapping[type, str]] = {str: "a text", list: "a list", int: "a whole number", dict: "an object"}

CHOICES: Final = ("n", "best_of")
"""Fields that say how many answers are made."""

_MODEL_NAME = re.compile(MODEL_NAME)


@dataclass(frozen=True)
class JsonBody:
    """A request's body, as bytes and parsed."""

    content: bytes
    fields: Mapping[str, Any]

    def as_request(self, request: Request, call: ModelCall, operation: OperationName) -> LlmRequest:
        """The request for the upstream, in the caller's bytes.

        The model is Azure's deployment in the path, else the body's, else the operation's or the service's
        default.
        """
        named = self.fields.get("model")
        default = OPERATIONS[operation].default_model or call.services.generation.default_model
        model = request.scope.get(DEPLOYMENT) or (default if named is None else str(named))
        content = with_fields(self.fields, self.content, {} if named == model else {"model": model})
        body = {**self.fields, "model": model}
        return LlmRequest(operation, model, body, content, passed_headers(request), verbatim=True)

    @property
    def stream(self) -> bool:
        """Whether the caller asks for a stream."""
        return self.fields.get("stream") is True

    @property
    def wants_usage(self) -> bool:
        """Whether the caller asks for token counts at the end of the stream."""
        options = self.fields.get("stream_options")
        return isinstance(options, dict) and options.get("include_usage") is True


async def read_request(request: Request, call: ModelCall, operation: OperationName) -> JsonBody:
    """Read the request of any operation that this service reads little of.

    Raises:
        ValidationError: It is no JSON object, or a field of the operation is missing or of another type.
    """
    content, passed = await json_content(request), call.services.pass_litellm_fields
    row = OPERATIONS[operation]
    own = {METADATA} if row.metadata else set()
    body = read_fields(content, passed | own | ({PREVIOUS} if row.continues else set()))
    metadata = body.fields.get(METADATA)
    if row.metadata and METADATA not in passed and metadata is not None and not _is_texts(metadata):
        refuse(METADATA, "must be an object of texts")
    if row.needs_model:
        check_named(body, request)
    for name in CHOICES:
        value = body.fields.get(name)
        # LiteLLM's mock makes as many as are asked for, until there is no memory left.
        if value is not None and not (type(value) is int and 1 <= value <= MAX_CHOICES):
            refuse(name, f"must be a whole number from 1 to {MAX_CHOICES}")
    for name, kinds in row.fields.items():
        value = body.fields.get(name)
        if not isinstance(value, kinds) or isinstance(value, bool):
            refuse(name, f"must be {' or '.join(KINDS[kind] for kind in kinds)}")
    stream = body.fields.get("stream")
    if not isinstance(stream, bool | None):
        refuse("stream", "must be true or false")
    if stream and row.read_event is None:
        refuse("stream", "is not possible here")
    return body


def check_named(body: JsonBody, request: Request) -> None:
    """Raise ``ValidationError`` where neither the body nor the path names a model."""
    if body.fields.get("model") is None and DEPLOYMENT not in request.scope:
        refuse("model", "must name a model")


def _is_texts(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str | None) for text in value.values())


def read_fields(content: bytes, passed: AbstractSet[str], max_values: int = MAX_VALUES) -> JsonBody:
    """Read a body: a JSON object without LiteLLM's own fields, which names at most one model.

    Args:
        content: The body.
        passed: Fields of LiteLLM's own that may be sent.
        max_values: Most values that it may hold.

    Raises:
        ValidationError: It is something else.
    """
    fields = read_json(content, max_values)
    if not isinstance(fields, dict):
        refuse("body", "must be a JSON object")
    field = control_field(fields.keys(), passed)
    if field is not None:
        refuse(field[:100], "is LiteLLM's own, and not permitted here")
    for name, problem in STORED_ELSEWHERE.items():
        if name not in passed and fields.get(name) is not None:
            refuse(name, problem)
    model = fields.get("model")
    if model is not None and not (isinstance(model, str) and _MODEL_NAME.fullmatch(model)):
        refuse("model", "must be the name of one model: up to 200 printable ASCII characters, no comma")
    return JsonBody(content, fields)


async def call_operation(
    request: Request,
    call: ModelCall,
    operation: OperationName,
    stream_format: Callable[[JsonBody], StreamFormat],
) -> Response:
    """Answer a request of an operation of which this service reads little.

    Args:
        request: The request.
        call: What its routes depend on.
        operation: Which operation it is.
        stream_format: Makes what writes a stream of it.
    """
    generation = call.services.generation
    body = await read_request(request, call, operation)
    asked = body.as_request(request, call, operation)
    spec = call.spec(asked, streamed=body.stream)
    if body.stream:
        return EventStream(generation.stream(spec), stream_format(body), call.services.stream_times)
    answer = await cancel_on_disconnect(request.receive, generation.answer(spec))
    return Response(answer.reply.content, media_type=JSON)


async def call_bytes(
    request: Request, call: ModelCall, operation: OperationName, stream_format: StreamFormat
) -> Response:
    """Answer a request in JSON whose answer is bytes, or events where the upstream answers with them."""
    body = await read_request(request, call, operation)
    asked = body.as_request(request, call, operation)
    stream = call.services.generation.stream(call.spec(asked, streamed=True))
    return EventStream(stream, stream_format, call.services.stream_times)


async def call_form(
    request: Request, call: ModelCall, operation: OperationName, stream_format: StreamFormat
) -> Response:
    """Answer a form with a file, which is passed on as it arrives."""
    generation, services = call.services.generation, call.services
    deployment: str | None = request.scope.get(DEPLOYMENT)
    form = await read_form(request, services.pass_litellm_fields, default_model=deployment)
    asked = LlmRequest(
        operation,
        form.model,
        {**form.fields, "model": form.model},
        b"",
        passed_headers(request),
        verbatim=True,
        upload=form.upload,
    )
    # The time in which the form is awaited is the caller's.
    deadline = Deadline.after(generation.timeout_s, clock=form.upload.clock)
    spec = replace(call, deadline=deadline).spec(asked, streamed=True)
    return EventStream(generation.stream(spec), stream_format, services.stream_times, upload=form.upload)


def passed_headers(request: Request) -> dict[str, str]:
    """The caller's header fields that are sent to the upstream."""
    # The upstream knows no value that is not ASCII, and none can be sent.
    given = ((name, request.headers.get(name, "")) for name in PASSED_HEADERS)
    return {name: value for name, value in given if value and value.isascii()}
