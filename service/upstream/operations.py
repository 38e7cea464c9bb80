"""The operations: what differs between the kinds of calls to a model, as data.

A new route under ``/v1`` is a row of ``OPERATIONS``, its schema and its tests. Deadlines, retries, circuits,
limits, records and telemetry are the same for every row. This module imports nothing of the client, so that
each of its modules can ask an operation what to do.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Final, Literal, Protocol

MAX_NAME_CHARS: Final = 256
MAX_ID_CHARS: Final = 1_024
MAX_ITEMS: Final = 1_000
"""Most items of one response whose owner is kept, or to which one request can refer."""
"""The longest id of a response that is read; LiteLLM's have some 400 characters. A part of one is no id."""

MAX_CHOICES: Final = 128
MAX_COUNT: Final = 100_000_000
"""The largest token count of one call that is believed; the largest context windows are a tenth of it."""

NamedEvent = tuple[Mapping[str, Any], str | None]
"""The data of an event, and its name where it has one."""

Shape = Literal["openai", "anthropic"]
"""Whose format the errors of a route have."""


@dataclass(frozen=True, slots=True)
class Counts:
    """The token counts of one call; None where the upstream sent none that can be true.

    Args:
        prompt: All tokens of the input, those that were read from a provider's cache included.
        completion: All tokens of the output, those of reasoning included.
        total: Both together.
        cache_read: Input tokens that were read from the provider's cache.
        cache_write: Input tokens that were written to it.
        reasoning: Output tokens of reasoning.
    """

    prompt: int | None = None
    completion: int | None = None
    total: int | None = None
    cache_read: int | None = None
    cache_write: int | None = None
    reasoning: int | None = None


@dataclass(frozen=True, slots=True)
class Facts:
    """What this service reads from an answer, whole or the events of a stream so far.

    Args:
        text: The text of the answer; of a stream, of this event. None where the text is of an unknown type.
        id: The upstream's id.
        model: The model that answered.
        usage: The upstream's ``usage``, as it is; it may hold the cost.
        finish_reasons: Why each choice ended, by its index.
        item_ids: The ids of a response's items, which a later request can refer to.
        pieces: Of a stream: how many pieces of the answer the event holds.
        usage_only: Of a stream: whether the event holds token counts and nothing else.
        ends: Of a stream: whether the event is the last one.
        failure: Of a stream: what a last event says about why the answer failed; None where it did not.
    """

    text: str | None = ""
    id: str | None = None
    model: str | None = None
    usage: Mapping[str, Any] = field(default_factory=dict)
    finish_reasons: Mapping[int, str] = field(default_factory=dict)
    item_ids: tuple[str, ...] = ()
    pieces: int = 0
    usage_only: bool = False
    ends: bool = False
    failure: Mapping[str, Any] | None = None


class NoAnswerError(ValueError):
    """The payload is not an answer of the operation."""


class ReadEvent(Protocol):
    """Reads one event of a stream."""

    def __call__(self, payload: Mapping[str, Any], name: str, /) -> Facts:
        """The facts in an event; ``payload`` is its data, ``name`` its ``event`` field, empty without one."""


OperationName = Literal[
    "chat",
    "embeddings",
    "completions",
    "responses",
    "messages",
    "count_tokens",
    "moderations",
    "images",
    "rerank",
    "speech",
    "transcriptions",
    "get_response",
    "delete_response",
    "cancel_response",
    "list_input_items",
]
"""Names an operation on metrics and in ``OPERATIONS``."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One kind of call.

    Args:
        path: Where its requests go, below ``/v1``, here and upstream; with the id of a stored response in it
            where ``stored`` is set.
        genai: The value of ``gen_ai.operation.name``.
        read: Reads a whole answer; raises ``NoAnswerError``.
        count: Reads a ``usage``.
        read_event: Reads an event of a stream; None where the operation has no streams.
        whole_as_events: Makes the events of a stream of a whole answer, for providers that answer a stream
            with one; each is the data and, where the protocol has one, the event's name.
        ends_with_done: Whether only ``[DONE]`` ends a stream; otherwise an event does.
        ends_with_body: Whether a stream with a finish reason ends with the body too.
        shape: Whose format errors have.
        cacheable: Whether answers may be stored, and shared by equal calls.
        asks_for_usage: Whether streams have to be asked for their token counts.
        needs_model: Whether a request must name a model; otherwise the default model answers.
        fields: The fields that a request must have, with their types.
        metadata: Whether the protocol has ``metadata``: texts by their names. LiteLLM has a field of this
            name too, which steers it by lists and objects.
        default_model: The model of a request that names none, where it is not the service's default one.
        request_body: How a request is written: in JSON, or as a form with files, which is passed on as it
            arrives.
        answer_body: Whether whole answers are JSON, or bytes of one of the media types, which are passed on
            as they arrive. Then the upstream decides whether it answers with a stream of events.
        method: The HTTP method.
        stored: Whether it is about a response that is stored. The model that made it need not be on offer any
            more, and its tokens and its cost were counted when it was made.
        continues: Whether a request can continue a stored response.
        partly_read: Whether only the fields that this service needs are read of a large whole answer.
        media: The media types of answers that are bytes; one that ends with a slash stands for all below it.
    """

    path: str
    genai: str
    read: Callable[[Mapping[str, Any]], Facts]
    count: Callable[[Mapping[str, Any]], Counts]
    read_event: ReadEvent | None = None
    whole_as_events: Callable[[Mapping[str, Any]], Iterator[NamedEvent]] | None = None
    ends_with_done: bool = True
    ends_with_body: bool = False
    shape: Shape = "openai"
    cacheable: bool = False
    asks_for_usage: bool = False
    needs_model: bool = False
    fields: Mapping[str, tuple[type, ...]] = field(default_factory=dict)
    metadata: bool = False
    default_model: str | None = None
    request_body: Literal["json", "form"] = "json"
    answer_body: Literal["json", "bytes"] = "json"
    partly_read: bool = False
    media: tuple[str, ...] = ()
    method: Literal["GET", "POST", "DELETE"] = "POST"
    stored: bool = False
    continues: bool = False

    def has_media_type(self, media_type: str) -> bool:
        """Whether answers in bytes may have this media type, given without parameters and in lower case."""
        return any(
            media_type.startswith(one) if one.endswith("/") else media_type == one for one in self.media
        )


def number_of(value: object) -> int | None:
    """A token count; None for anything else, and for what cannot be true."""
    return value if type(value) is int and 0 <= value <= MAX_COUNT else None


def name_of(payload: Mapping[str, Any], key: str) -> str | None:
    """A name in an answer, of bounded length; None where there is none."""
    value = payload.get(key)
    return value[:MAX_NAME_CHARS] if isinstance(value, str) and value else None


def id_of(payload: Mapping[str, Any]) -> str | None:
    """The id of a response in an answer; None where there is none, or none of bounded length."""
    value = payload.get("id")
    return value if isinstance(value, str) and 0 < len(value) <= MAX_ID_CHARS else None


def object_of(payload: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """An object in an answer; empty where there is none."""
    value = payload.get(key)
    return value if isinstance(value, dict) else {}


def objects_of(payload: Mapping[str, Any], key: str, most: int = MAX_CHOICES) -> list[Mapping[str, Any]]:
    """The objects of a list, at most as many as choices are permitted; empty where there is none."""
    value = payload.get(key)
    return [one for one in value[:most] if isinstance(one, dict)] if isinstance(value, list) else []


def text_of(value: object) -> str:
    """A text; empty for anything else."""
    return value if isinstance(value, str) else ""


# ---- Token counts --------------------------------------------------------------------------------------


def count_openai(usage: Mapping[str, Any]) -> Counts:
    """The counts of chat completions, completions and embeddings."""
    given, made = object_of(usage, "prompt_tokens_details"), object_of(usage, "completion_tokens_details")
    return Counts(
        prompt=number_of(usage.get("prompt_tokens")),
        completion=number_of(usage.get("completion_tokens")),
        total=number_of(usage.get("total_tokens")),
        cache_read=number_of(given.get("cached_tokens")),
        reasoning=number_of(made.get("reasoning_tokens")),
    )


def count_responses(usage: Mapping[str, Any]) -> Counts:
    """The counts of Responses and images."""
    given, made = object_of(usage, "input_tokens_details"), object_of(usage, "output_tokens_details")
    return Counts(
        prompt=number_of(usage.get("input_tokens")),
        completion=number_of(usage.get("output_tokens")),
        total=number_of(usage.get("total_tokens")),
        cache_read=number_of(given.get("cached_tokens")),
        reasoning=number_of(made.get("reasoning_tokens")),
    )


def count_messages(usage: Mapping[str, Any]) -> Counts:
    """The counts of Messages, whose ``input_tokens`` are those that no cache was used for.

    The conventions for Anthropic count all of them as input tokens.
    """
    fresh = number_of(usage.get("input_tokens"))
    read = number_of(usage.get("cache_read_input_tokens"))
    written = number_of(usage.get("cache_creation_input_tokens"))
    made = number_of(usage.get("output_tokens"))
    prompt = None if fresh is None else fresh + (read or 0) + (written or 0)
    total = None if prompt is None or made is None else prompt + made
    return Counts(prompt, made, total, cache_read=read, cache_write=written)


def count_nothing(_usage: Mapping[str, Any]) -> Counts:
    """No counts."""
    return Counts()


# ---- Whole answers -------------------------------------------------------------------------------------


def _facts(payload: Mapping[str, Any], text: str | None, reasons: Mapping[int, str] | None = None) -> Facts:
    return Facts(
        text=text,
        id=name_of(payload, "id"),
        model=name_of(payload, "model"),
        usage=object_of(payload, "usage"),
        finish_reasons=reasons or {},
    )


def read_chat(payload: Mapping[str, Any]) -> Facts:
    """A chat completion."""
    choices = payload.get("choices")
    if not isinstance(choices, list) or not choices:
        raise NoAnswerError
    message = choices[0].get("message") if isinstance(choices[0], dict) else None
    if not isinstance(message, dict):
        raise NoAnswerError
    # A refusal, or a call of tools, has no content.
    said = message.get("content")
    text = message.get("refusal") or "" if said is None else said
    return _facts(payload, text if isinstance(text, str) else None, _reasons(objects_of(payload, "choices")))


def read_completion(payload: Mapping[str, Any]) -> Facts:
    """A completion of the older protocol, which has texts instead of messages."""
    choices = objects_of(payload, "choices")
    if not choices:
        raise NoAnswerError
    return _facts(payload, text_of(choices[0].get("text")), _reasons(choices))


def read_response(payload: Mapping[str, Any]) -> Facts:
    """A response; the reason of its end is that of an incomplete one, or its status."""
    if not isinstance(payload.get("output"), list) and payload.get("object") != "response":
        raise NoAnswerError
    reason = object_of(payload, "incomplete_details").get("reason") or payload.get("status")
    reasons = {0: reason[:MAX_NAME_CHARS]} if isinstance(reason, str) else {}
    facts = _facts(payload, _text_of_output(payload), reasons)
    return replace(facts, id=id_of(payload), item_ids=item_ids_of(payload, "output"))


def read_input_items(payload: Mapping[str, Any]) -> Facts:
    """The items that a response was made from."""
    return replace(reads_list("data")(payload), item_ids=item_ids_of(payload, "data"))


def item_ids_of(payload: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """The ids of a list of items, as many as are kept."""
    items = payload.get(key)
    found = (id_of(item) for item in (items if isinstance(items, list) else []) if isinstance(item, dict))
    return tuple(islice(filter(None, found), MAX_ITEMS))


def read_stored_response(payload: Mapping[str, Any]) -> Facts:
    """A response that was stored, whose text and counts belong to the call that made it."""
    return replace(read_response(payload), text="", usage={})


def read_deletion(payload: Mapping[str, Any]) -> Facts:
    """The confirmation that a stored response was deleted."""
    if payload.get("deleted") is not True:
        raise NoAnswerError
    return Facts(id=id_of(payload))


def _text_of_output(payload: Mapping[str, Any]) -> str:
    return "".join(
        text_of(part.get("text"))
        for item in objects_of(payload, "output")
        for part in objects_of(item, "content")
        if part.get("type") == "output_text"
    )


def read_message(payload: Mapping[str, Any]) -> Facts:
    """A message of Anthropic's protocol."""
    if not isinstance(payload.get("content"), list):
        raise NoAnswerError
    parts = objects_of(payload, "content")
    text = "".join(text_of(part.get("text")) for part in parts if part.get("type") == "text")
    reason = name_of(payload, "stop_reason")
    return _facts(payload, text, {0: reason} if reason else None)


def reads_list(key: str) -> Callable[[Mapping[str, Any]], Facts]:
    """A reader of answers that are a list under a name, and no text."""

    def read(payload: Mapping[str, Any]) -> Facts:
        if not isinstance(payload.get(key), list):
            raise NoAnswerError
        return _facts(payload, "")

    return read


def read_token_count(payload: Mapping[str, Any]) -> Facts:
    """The count of tokens that a message would have."""
    if number_of(payload.get("input_tokens")) is None:
        raise NoAnswerError
    return Facts()


def read_transcription(payload: Mapping[str, Any]) -> Facts:
    """The text of a recording."""
    if not isinstance(payload.get("text"), str):
        raise NoAnswerError
    return _facts(payload, payload["text"])


def read_no_json(_payload: Mapping[str, Any]) -> Facts:
    """Raises ``NoAnswerError``: no answer of the operation is JSON."""
    raise NoAnswerError


def _reasons(choices: list[Mapping[str, Any]]) -> dict[int, str]:
    """The finish reasons of choices, by their index."""
    found: dict[int, str] = {}
    for place, choice in enumerate(choices):
        reason, index = choice.get("finish_reason"), number_of(choice.get("index"))
        if isinstance(reason, str):
            found[place if index is None else index] = reason[:MAX_NAME_CHARS]
    return found


# ---- Events of streams ---------------------------------------------------------------------------------


def read_chat_event(payload: Mapping[str, Any], _name: str) -> Facts:
    """An event of a chat completion."""
    choices = objects_of(payload, "choices")
    deltas = [(number_of(one.get("index")), object_of(one, "delta")) for one in choices]
    usage = object_of(payload, "usage")
    return Facts(
        text="".join(text_of(delta.get("content")) for index, delta in deltas if index in {0, None}),
        id=name_of(payload, "id"),
        model=name_of(payload, "model"),
        usage=usage,
        finish_reasons=_reasons(choices),
        pieces=sum(any(value for name, value in delta.items() if name != "role") for _, delta in deltas),
        usage_only=bool(usage) and not any(map(_has_content, payload.get("choices") or ())),
    )


def _has_content(choice: object) -> bool:
    """Whether a choice holds more than its index; LiteLLM sends an empty one with the usage."""
    if not isinstance(choice, dict):
        return True
    delta = choice.get("delta")
    content = any(delta.values()) if isinstance(delta, dict) else bool(delta)
    return content or any(value for name, value in choice.items() if name not in {"index", "delta"})


def read_completion_event(payload: Mapping[str, Any], _name: str) -> Facts:
    """An event of a completion of the older protocol."""
    choices = objects_of(payload, "choices")
    usage = object_of(payload, "usage")
    return Facts(
        text="".join(text_of(one.get("text")) for one in choices if one.get("index", 0) == 0),
        id=name_of(payload, "id"),
        model=name_of(payload, "model"),
        usage=usage,
        finish_reasons=_reasons(choices),
        pieces=sum(bool(one.get("text")) for one in choices),
        usage_only=bool(usage) and not choices,
    )


RESPONSE_ENDS: Final = frozenset({"response.completed", "response.incomplete", "response.failed"})


def read_response_event(payload: Mapping[str, Any], name: str) -> Facts:
    """An event of a response; its type is in the data, and in its name too."""
    kind = text_of(payload.get("type")) or name
    response = object_of(payload, "response")
    if kind in RESPONSE_ENDS:
        read = read_response({"output": [], **response})
        return replace(
            read, text="", ends=True, failure=_failure(response) if kind == "response.failed" else None
        )
    return Facts(
        text=text_of(payload.get("delta")) if kind == "response.output_text.delta" else "",
        id=id_of(response),
        model=name_of(response, "model"),
        pieces=int(kind.endswith(".delta")),
    )


def _failure(response: Mapping[str, Any]) -> Mapping[str, Any]:
    """Why a response failed; the client's library reads it from the event itself."""
    return object_of(response, "error")


def read_message_event(payload: Mapping[str, Any], name: str) -> Facts:
    """An event of a message of Anthropic's protocol."""
    match text_of(payload.get("type")) or name:
        case "message_start":
            message = object_of(payload, "message")
            return Facts(
                id=name_of(message, "id"), model=name_of(message, "model"), usage=object_of(message, "usage")
            )
        case "content_block_delta":
            delta = object_of(payload, "delta")
            text = text_of(delta.get("text")) if delta.get("type") == "text_delta" else ""
            return Facts(text=text, pieces=1)
        case "message_delta":
            reason = name_of(object_of(payload, "delta"), "stop_reason")
            return Facts(usage=object_of(payload, "usage"), finish_reasons={0: reason} if reason else {})
        case "message_stop":
            return Facts(ends=True)
        case _:
            return Facts()


def reads_typed_events(text_delta: str, done: str) -> ReadEvent:
    """A reader of events of audio, which are typed like those of a response.

    Args:
        text_delta: The type of an event with a piece of text.
        done: The type of the last event, which has the counts.
    """

    def read(payload: Mapping[str, Any], name: str, /) -> Facts:
        kind = text_of(payload.get("type")) or name
        return Facts(
            text=text_of(payload.get("delta")) if kind == text_delta else "",
            usage=object_of(payload, "usage"),
            pieces=int(kind.endswith(".delta")),
            finish_reasons={0: "stop"} if kind == done else {},
            ends=kind == done,
        )

    return read


# ---- Whole answers as streams ----------------------------------------------------------------------------


def chat_as_events(answer: Mapping[str, Any]) -> Iterator[NamedEvent]:
    """A chat completion: for each choice a chunk with all of it and one with its end; then the counts."""
    choices = answer.get("choices")
    if not isinstance(choices, list) or not 0 < len(choices) <= MAX_CHOICES:
        raise NoAnswerError
    if not all(isinstance(choice, dict) for choice in choices):
        raise NoAnswerError
    head = {name: value for name, value in answer.items() if name not in {"choices", "usage"}}
    head["object"] = "chat.completion.chunk"
    for place, choice in enumerate(choices):
        message = choice.get("message")
        if not isinstance(message, dict):
            raise NoAnswerError
        end = {"index": choice.get("index", place), "finish_reason": choice.get("finish_reason")}
        more = {name: value for name, value in choice.items() if name not in {"message", *end}}
        delta = {"role": "assistant", **message}
        calls = message.get("tool_calls")
        if isinstance(calls, list):
            delta["tool_calls"] = [
                {"index": number, **call} for number, call in enumerate(calls) if isinstance(call, dict)
            ]
        yield {**head, "choices": [{**more, **end, "delta": delta, "finish_reason": None}]}, None
        yield {**head, "choices": [{**end, "delta": {}}]}, None
    if isinstance(answer.get("usage"), dict):
        yield {**head, "choices": [], "usage": answer["usage"]}, None


def completion_as_events(answer: Mapping[str, Any]) -> Iterator[NamedEvent]:
    """A completion of the older protocol, whose chunks have its shape."""
    read_completion(answer)
    yield answer, None


def message_as_events(answer: Mapping[str, Any]) -> Iterator[NamedEvent]:
    """A message of Anthropic's protocol: each block starts, comes in one piece, and stops."""
    read_message(answer)
    usage = object_of(answer, "usage")
    start = {**answer, "content": [], "stop_reason": None, "stop_sequence": None}
    yield {"type": "message_start", "message": start}, "message_start"
    for index, block in enumerate(answer["content"]):
        if not isinstance(block, dict):
            raise NoAnswerError
        opening, deltas = _block_as_deltas(block)
        yield {"type": "content_block_start", "index": index, "content_block": opening}, "content_block_start"
        for delta in deltas:
            yield {"type": "content_block_delta", "index": index, "delta": delta}, "content_block_delta"
        yield {"type": "content_block_stop", "index": index}, "content_block_stop"
    end = {name: answer.get(name) for name in ("stop_reason", "stop_sequence")}
    yield {"type": "message_delta", "delta": end, "usage": usage}, "message_delta"
    yield {"type": "message_stop"}, "message_stop"


def response_as_events(answer: Mapping[str, Any]) -> Iterator[NamedEvent]:
    """A response: each item is added, comes in one piece for each of its parts, and is done."""
    read_response(answer)
    end = f"response.{answer['status']}" if answer.get("status") in ENDED else "response.completed"
    started = {**answer, "status": "in_progress", "output": [], "usage": None}
    events: list[Mapping[str, Any]] = [
        {"type": "response.created", "response": started},
        {"type": "response.in_progress", "response": started},
    ]
    for index, item in enumerate(objects_of(answer, "output", MAX_ITEMS)):
        events += _item_as_events(item, {"output_index": index})
    events.append({"type": end, "response": answer})
    for number, event in enumerate(events):
        yield {**event, "sequence_number": number}, event["type"]


def images_as_events(answer: Mapping[str, Any]) -> Iterator[NamedEvent]:
    """Images: each is completed; the last one has the counts."""
    images = objects_of(answer, "data")
    if not images:
        raise NoAnswerError
    about = {name: value for name, value in answer.items() if name not in {"data", "created", "usage"}}
    kind = "image_generation.completed"
    for image in images:
        event = {"type": kind, "created_at": answer.get("created"), **about, **image}
        yield event | ({"usage": answer.get("usage")} if image is images[-1] else {}), kind


def read_image_event(payload: Mapping[str, Any], name: str) -> Facts:
    """An event of images. There may be several, so only the end of the body is the end of the stream."""
    completed = (text_of(payload.get("type")) or name) == "image_generation.completed"
    return Facts(usage=object_of(payload, "usage"), finish_reasons={0: "stop"} if completed else {})


ENDED: Final = frozenset({"incomplete", "failed"})
DELTAS: Final[Mapping[str, tuple[str, str]]] = {
    "output_text": ("response.output_text", "text"),
    "refusal": ("response.refusal", "refusal"),
}
"""By the type of a part of a message: what its events are called, and the field that comes in pieces."""


EMPTY: Final[Mapping[str, Mapping[str, Any]]] = {
    "message": {"content": []},
    "function_call": {"arguments": ""},
}
"""By the type of an item: what is empty when it is added."""


def _item_as_events(item: Mapping[str, Any], at: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    kind, place = item.get("type"), {**at, "item_id": item.get("id")}
    empty: Mapping[str, Any] = EMPTY.get(text_of(kind), {})
    yield {"type": "response.output_item.added", **at, "item": {**item, "status": "in_progress", **empty}}
    if kind == "function_call":
        given = {"arguments": item.get("arguments")}
        yield {
            "type": "response.function_call_arguments.delta",
            **place,
            "delta": item.get("arguments"),
        }
        yield {"type": "response.function_call_arguments.done", **place, **given}
    for number, part in enumerate(objects_of(item, "content") if kind == "message" else []):
        where = {**place, "content_index": number}
        name, field_name = DELTAS.get(text_of(part.get("type")), ("", ""))
        blank = {**part, field_name: ""} if name else part
        yield {"type": "response.content_part.added", **where, "part": blank}
        if name:
            yield {"type": f"{name}.delta", **where, "delta": part.get(field_name), "logprobs": []}
            yield {
                "type": f"{name}.done",
                **where,
                field_name: part.get(field_name),
                "logprobs": [],
            }
        yield {"type": "response.content_part.done", **where, "part": part}
    yield {"type": "response.output_item.done", **at, "item": item}


def _block_as_deltas(block: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[Mapping[str, Any]]]:
    """A block as it starts, and what completes it; a block of another type is whole at its start."""
    match block.get("type"):
        case "text":
            opening = {**block, "text": ""}
            return opening, [{"type": "text_delta", "text": block.get("text")}]
        case "thinking":
            opening = {**block, "thinking": "", "signature": ""}
            return opening, [
                {"type": "thinking_delta", "thinking": block.get("thinking")},
                {"type": "signature_delta", "signature": block.get("signature")},
            ]
        case "tool_use" | "server_tool_use":
            given = json.dumps(block.get("input"), separators=(",", ":"))
            return {**block, "input": {}}, [{"type": "input_json_delta", "partial_json": given}]
        case _:
            return block, []


OPERATIONS: Final[Mapping[OperationName, Operation]] = {
    "chat": Operation(
        path="/chat/completions",
        genai="chat",
        read=read_chat,
        count=count_openai,
        read_event=read_chat_event,
        whole_as_events=chat_as_events,
        cacheable=True,
        asks_for_usage=True,
        partly_read=True,
    ),
    "embeddings": Operation(
        path="/embeddings",
        genai="embeddings",
        read=reads_list("data"),
        count=count_openai,
        needs_model=True,
        partly_read=True,
    ),
    "completions": Operation(
        path="/completions",
        genai="text_completion",
        read=read_completion,
        count=count_openai,
        read_event=read_completion_event,
        whole_as_events=completion_as_events,
        asks_for_usage=True,
        fields={"prompt": (str, list)},
    ),
    "responses": Operation(
        path="/responses",
        genai="chat",
        read=read_response,
        count=count_responses,
        read_event=read_response_event,
        whole_as_events=response_as_events,
        ends_with_done=False,
        metadata=True,
        continues=True,
    ),
    "messages": Operation(
        path="/messages",
        genai="chat",
        read=read_message,
        count=count_messages,
        read_event=read_message_event,
        whole_as_events=message_as_events,
        ends_with_done=False,
        shape="anthropic",
        fields={"messages": (list,), "max_tokens": (int,)},
        metadata=True,
    ),
    "count_tokens": Operation(
        path="/messages/count_tokens",
        genai="count_tokens",
        read=read_token_count,
        count=count_nothing,
        shape="anthropic",
        fields={"messages": (list,)},
    ),
    "moderations": Operation(
        path="/moderations",
        genai="moderation",
        read=reads_list("results"),
        count=count_nothing,
        fields={"input": (str, list)},
        default_model="omni-moderation-latest",
    ),
    "images": Operation(
        path="/images/generations",
        genai="image_generation",
        read=reads_list("data"),
        count=count_responses,
        read_event=read_image_event,
        whole_as_events=images_as_events,
        ends_with_done=False,
        ends_with_body=True,
        needs_model=True,
        fields={"prompt": (str,)},
        partly_read=True,
    ),
    "rerank": Operation(
        path="/rerank",
        genai="rerank",
        read=reads_list("results"),
        count=count_openai,
        needs_model=True,
        fields={"query": (str,), "documents": (list,)},
    ),
    "speech": Operation(
        path="/audio/speech",
        genai="speech",
        read=read_no_json,
        count=count_responses,
        read_event=reads_typed_events("", "speech.audio.done"),
        ends_with_done=False,
        needs_model=True,
        fields={"input": (str,)},
        answer_body="bytes",
        media=("audio/", "application/octet-stream"),
    ),
    "transcriptions": Operation(
        path="/audio/transcriptions",
        genai="transcription",
        read=read_transcription,
        count=count_responses,
        read_event=reads_typed_events("transcript.text.delta", "transcript.text.done"),
        ends_with_done=False,
        needs_model=True,
        request_body="form",
        answer_body="bytes",
        media=("application/json", "text/plain", "text/vtt", "application/x-subrip", "application/srt"),
    ),
    "get_response": Operation(
        path="/responses/{response_id}",
        genai="get_response",
        read=read_stored_response,
        count=count_nothing,
        method="GET",
        stored=True,
    ),
    "delete_response": Operation(
        path="/responses/{response_id}",
        genai="delete_response",
        read=read_deletion,
        count=count_nothing,
        method="DELETE",
        stored=True,
    ),
    "cancel_response": Operation(
        path="/responses/{response_id}/cancel",
        genai="cancel_response",
        read=read_stored_response,
        count=count_nothing,
        stored=True,
    ),
    "list_input_items": Operation(
        path="/responses/{response_id}/input_items",
        genai="list_input_items",
        read=read_input_items,
        count=count_nothing,
        method="GET",
        stored=True,
    ),
}
"""Every operation. The paths stand below ``/v1``, here and at LiteLLM."""
