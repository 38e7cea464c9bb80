"""OpenAI's Responses under ``/v1``: making them, and what can be done with those that are stored.

A stored response belongs to the caller who made it. For everybody else, administrators included, there is
none: they get the answer for an id that does not exist, and the upstream is not asked.
"""

import re
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from http import HTTPStatus
from typing import Annotated, Any, Final
from urllib.parse import urlencode

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from service.dependencies import FreeCallDep, ModelCall, ModelCallDep, only_query
from service.errors import (
    BadRequestError,
    CircuitOpenError,
    DependencyUnavailableError,
    NotFoundError,
    PayloadTooLargeError,
    RequestTimeoutError,
    ServiceError,
    UnsupportedMediaTypeError,
    ValidationError,
)
from service.middleware.errors import OPENAI_PREFIX
from service.routers.bodies import CallRoute, json_content, refuse
from service.routers.calls import (
    ALWAYS,
    CALL_ERRORS,
    JSON,
    PREVIOUS,
    UNAVAILABLE,
    JsonBody,
    passed_headers,
    read_fields,
    read_request,
)
from service.routers.openai import ResponsesFormat
from service.routers.schemas import (
    DELETED_RESPONSE,
    INPUT_ITEMS,
    RESPONSES_ANSWER,
    RESPONSES_REQUEST,
    STORED_RESPONSE,
    openai_errors,
)
from service.routers.streaming import EventStream
from service.services.call_report import CallOutcome
from service.services.generation import AnswerStream
from service.upstream.messages import Completion, LlmRequest
from service.upstream.operations import (
    MAX_ID_CHARS,
    MAX_ITEMS,
    OPERATIONS,
    OperationName,
    id_of,
    item_ids_of,
    object_of,
)
from service.upstream.stream import StreamEvent
from service.utils.disconnect import cancel_on_disconnect

RESPONSE_ID: Final = re.compile(rf"[A-Za-z0-9][A-Za-z0-9_.=+-]{{0,{MAX_ID_CHARS - 1}}}")
"""The ids that may stand in a path of the upstream's, which none of these can change. OpenAI's have letters,
digits and underscores; LiteLLM's are Base64, in either alphabet."""

NAMING: Final = frozenset({"get_response", "cancel_response"})
"""Operations whose answers name the response. LiteLLM encrypts the id anew for each answer, and clients go on
with the one that they got last. The answer to a deletion has the provider's own id, which nobody needs."""

INCLUDE: Final = ("include", "include[]")
STREAM_QUERY: Final = ("stream", "starting_after", "include_obfuscation")
PAGE_QUERY: Final = ("after", "before", "limit", "order")
MAX_QUERY_CHARS: Final = 1_024
"""The longest value of a query parameter."""

IMAGE: Final = "image_generation_call"
API_VERSION: Final = "api-version"
"""A query parameter of Azure's clients, which is not sent on."""

UNSENT_QUERY: Final = frozenset({*STREAM_QUERY, API_VERSION})

STORED_ERRORS = (
    *(*ALWAYS, NotFoundError, ValidationError),
    *(CircuitOpenError, DependencyUnavailableError, *UNAVAILABLE),
)

NoQuery = Annotated[None, Depends(only_query(API_VERSION))]

router = APIRouter(prefix=OPENAI_PREFIX, tags=["openai"], route_class=CallRoute)


@router.post(
    "/responses",
    response_class=Response,
    responses={200: RESPONSES_ANSWER, **openai_errors(*CALL_ERRORS, DependencyUnavailableError)},
    openapi_extra={"requestBody": RESPONSES_REQUEST},
)
async def responses(request: Request, call: ModelCallDep) -> Response:
    """OpenAI's response, whole or as typed events; the default model answers where none is named.

    `previous_response_id` must be that of a response of the caller's own, and `conversation` is not possible.
    A failure after the first event is an event of the type `error`.
    """
    services = call.services
    body = await read_request(request, call, "responses")
    if body.fields.get("background") and any(own.limits.budget for own in call.user.limits):
        # It is answered before it has cost anything, and tells its cost only if somebody asks for it.
        refuse("background", "is not possible with a budget, which could not count it")
    await _check_previous(body, call)
    await _check_items(body, call)
    asked = body.as_request(request, call, "responses")
    keeper = _Keeper(call, asked.model, stored=body.fields.get("store") is not False)
    spec = call.spec(asked, streamed=body.stream)
    if body.stream:
        stream = _keeping(services.generation.stream(spec), keeper)
        return EventStream(stream, ResponsesFormat(), services.stream_times)
    answer = await cancel_on_disconnect(request.receive, services.generation.answer(spec))
    await keeper.keep(answer.reply.completion.id)
    await keeper.keep_items(answer.reply.completion.item_ids)
    return Response(answer.reply.content, media_type=JSON)


async def _check_previous(body: JsonBody, call: ModelCall) -> None:
    """Refuse to continue a response that the caller has not made: the model would tell what is in it."""
    previous = body.fields.get(PREVIOUS)
    if previous is None:
        return
    if not isinstance(previous, str):
        refuse(PREVIOUS, "must be a text")
    found = await call.services.responses.find(previous)
    if found is None or found.owner != call.user.username:
        raise BadRequestError(
            "The previous response was not found. It must be one of your own that is stored.",
            param=PREVIOUS,
            code="previous_response_not_found",
        )


async def _check_items(body: JsonBody, call: ModelCall) -> None:
    """Refuse items of other callers': the provider would put what it has stored in their place.

    An item that is known to be another caller's is refused whatever it is. A reference must be to an item
    that is known; other items may be a model's that stores nothing.
    """
    given = body.fields.get("input")
    items = [item for item in given if isinstance(item, dict)] if isinstance(given, list) else []
    references = [id_of(item) for item in items if _is_reference(item)]
    named = {item_id for item in items if (item_id := id_of(item)) is not None}
    if len(named) > MAX_ITEMS:
        refuse("input", f"must not have more than {MAX_ITEMS:,} items with an id")
    if not named and not references:
        return
    found = await call.services.responses.find_items(named)
    strange = any(stored.owner != call.user.username for stored in found.values())
    if strange or any(reference not in found for reference in references):
        raise BadRequestError(
            "An item of the input was not found. It must be one of your own that is stored.", param="input"
        )


def _is_reference(item: Mapping[str, Any]) -> bool:
    """Whether an item stands for one that the provider has stored."""
    kind = item.get("type")
    if kind == IMAGE:
        return not item.get("result")
    return kind == "item_reference" or (kind is None and item.get("role") is None)


class _Keeper:
    """Keeps the owner of each id that an answer tells, before the caller is told."""

    def __init__(self, call: ModelCall, model: str, *, stored: bool) -> None:
        self._owners = call.services.responses
        self._owner = call.user.username
        self._model = model
        self._stored = stored
        self._kept: set[str] = set()

    async def keep(self, response_id: str | None) -> None:
        """Keep this id, unless it has been kept or the response is not stored."""
        if response_id is not None and self._stored and response_id not in self._kept:
            self._kept.add(response_id)
            await self._owners.keep(response_id, self._owner, self._model)

    async def keep_items(self, item_ids: Iterable[str]) -> None:
        """Keep the ids of these items of the response, unless they have been kept or it is not stored."""
        new = set(item_ids) - self._kept
        if new and self._stored:
            self._kept |= new
            await self._owners.keep_items(new, self._owner, self._model)


class _KeptStream:
    """A streamed response whose ids are kept before their events are handed on."""

    def __init__(self, stream: AnswerStream, keeper: _Keeper) -> None:
        self._stream = stream
        self._keeper = keeper
        self.content_type = stream.content_type

    @property
    def completion(self) -> Completion:
        """What is known of the answer."""
        return self._stream.completion

    @property
    def outcome(self) -> CallOutcome:
        """How the call ended."""
        return self._stream.outcome

    async def __aiter__(self) -> AsyncIterator[StreamEvent]:
        async for event in self._stream:
            if event.payload is not None:
                response = object_of(event.payload, "response")
                await self._keeper.keep(id_of(response))
                item_id = id_of(object_of(event.payload, "item"))
                await self._keeper.keep_items(
                    (*item_ids_of(response, "output"), *(() if item_id is None else (item_id,)))
                )
            yield event


@asynccontextmanager
async def _keeping(
    stream: AbstractAsyncContextManager[AnswerStream], keeper: _Keeper
) -> AsyncIterator[_KeptStream]:
    async with stream as events:
        yield _KeptStream(events, keeper)


@router.get(
    "/responses/{response_id}",
    response_class=Response,
    responses={200: STORED_RESPONSE, **openai_errors(*STORED_ERRORS)},
)
async def get_response(
    response_id: str,
    request: Request,
    call: FreeCallDep,
    _query: Annotated[None, Depends(only_query(*INCLUDE, *STREAM_QUERY, API_VERSION, repeatable=INCLUDE))],
) -> Response:
    """A stored response of the caller's own; one that was made with `background` is polled here.

    LiteLLM cannot give it as a stream.
    """
    if request.query_params.get("stream", "false") != "false" or "starting_after" in request.query_params:
        refuse("query.stream", "is not possible for a stored response; ask for it again until it is complete")
    return await _call_stored(request, call, "get_response", response_id)


@router.delete(
    "/responses/{response_id}",
    response_class=Response,
    responses={200: DELETED_RESPONSE, **openai_errors(*STORED_ERRORS)},
)
async def delete_response(
    response_id: str,
    request: Request,
    call: FreeCallDep,
    _query: Annotated[None, Depends(only_query(API_VERSION))],
) -> Response:
    """Delete a stored response of the caller's own."""
    answer = await _call_stored(request, call, "delete_response", response_id)
    # Not before: where the upstream fails, the caller must be able to try again.
    await call.services.responses.forget(response_id)
    return answer


@router.post(
    "/responses/{response_id}/cancel",
    response_class=Response,
    responses={
        200: STORED_RESPONSE,
        **openai_errors(
            *(*STORED_ERRORS, RequestTimeoutError, PayloadTooLargeError, UnsupportedMediaTypeError)
        ),
    },
)
async def cancel_response(
    response_id: str,
    request: Request,
    call: FreeCallDep,
    _query: Annotated[None, Depends(only_query(API_VERSION))],
) -> Response:
    """Cancel a response of the caller's own that is made in the background."""
    content = await json_content(request)
    if content.strip() and read_fields(content, frozenset()).fields:
        refuse("body", "must be empty")
    return await _call_stored(request, call, "cancel_response", response_id)


@router.get(
    "/responses/{response_id}/input_items",
    response_class=Response,
    responses={200: INPUT_ITEMS, **openai_errors(*STORED_ERRORS)},
)
async def list_input_items(
    response_id: str,
    request: Request,
    call: FreeCallDep,
    _query: Annotated[
        None,
        Depends(only_query(*INCLUDE, API_VERSION, "after", "before", "limit", "order", repeatable=INCLUDE)),
    ],
) -> Response:
    """What a stored response of the caller's own was made from."""
    return await _call_stored(request, call, "list_input_items", response_id)


async def _call_stored(
    request: Request, call: ModelCall, operation: OperationName, response_id: str
) -> Response:
    """Answer a request about a stored response, as any call to the model that made it.

    Raises:
        NotFoundError: The caller has not made it, or it is no longer there.
        DependencyUnavailableError: It is not known who has made it.
    """
    query = [(name, value) for name, value in request.query_params.multi_items() if name not in UNSENT_QUERY]
    for name, value in query:
        if len(value) > MAX_QUERY_CHARS:
            refuse(f"query.{name}", f"must have at most {MAX_QUERY_CHARS} characters")
    services = call.services
    found = await services.responses.find(response_id) if RESPONSE_ID.fullmatch(response_id) else None
    if found is None or found.owner != call.user.username:
        raise _not_found()
    path = OPERATIONS[operation].path.format(response_id=response_id)
    asked = LlmRequest(
        operation,
        found.model,
        {},
        b"",
        passed_headers(request),
        verbatim=True,
        path=f"{path}?{urlencode(query)}" if query else path,
    )
    try:
        answer = await cancel_on_disconnect(request.receive, services.generation.answer(call.spec(asked)))
    except ServiceError as error:
        if error.upstream_status != HTTPStatus.NOT_FOUND:
            raise
        if operation == "delete_response":
            await services.responses.forget(response_id)
        raise _not_found() from None
    told = answer.reply.completion.id
    if operation in NAMING and told is not None:
        await services.responses.keep(told, found.owner, found.model)
    await services.responses.keep_items(answer.reply.completion.item_ids, found.owner, found.model)
    return Response(answer.reply.content, media_type=JSON)


def _not_found() -> NotFoundError:
    """The same for an id of another caller's, one that does not exist, and one that was deleted."""
    return NotFoundError("There is no such response.", param="response_id")
