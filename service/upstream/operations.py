"""The operations: what differs between the kinds of calls to a model, as data.

A new route under ``/v1`` is a row of ``OPERATIONS``, its schema and its tests. Deadlines, retries, circuits,
limits, records and telemetry are the same for every row. This module imports nothing of the client, so that
each of its modules can ask an operation what to do.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Protocol

MAX_NAME_CHARS: Final = 256
MAX_CHOICES: Final = 128
MAX_COUNT: Final = 100_000_000
"""The largest token count of one call that is believed; the largest context windows are a tenth of it."""

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
        text: The text of the answer; of a stream, of this event.
        id: The upstream's id.
        model: The model that answered.
        usage: The upstream's ``usage``, as it is; it may hold the cost.
        finish_reasons: Why each choice ended, by its index.
        content: Of a stream: whether the event holds a piece of the answer.
        ends: Of a stream: whether the event is the last one.
        error: Of a stream: what the event says about an error; None where it is none.
    """

    text: str = ""
    id: str | None = None
    model: str | None = None
    usage: Mapping[str, Any] = field(default_factory=dict)
    finish_reasons: Mapping[int, str] = field(default_factory=dict)
    content: bool = False
    ends: bool = False
    error: Mapping[str, Any] | None = None


class NoAnswerError(ValueError):
    """The payload is not an answer of the operation."""


class ReadEvent(Protocol):
    """Reads one event of a stream."""

    def __call__(self, payload: Mapping[str, Any], name: str, /) -> Facts:
        """The event's facts; ``payload`` is its data, ``name`` its ``event`` field, empty where it has none."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One kind of call.

    Args:
        name: Names it on metrics; one of a closed set.
        path: Where its requests go, below ``/v1``, here and upstream.
        genai: The value of ``gen_ai.operation.name``.
        read: Reads a whole answer; raises ``NoAnswerError``.
        count: Reads a ``usage``.
        read_event: Reads an event of a stream; None where the operation has no streams.
        ends_with_done: Whether only ``[DONE]`` ends a stream; otherwise an event does.
        shape: Whose format errors have.
        cacheable: Whether answers may be stored, and shared by equal calls.
        asks_for_usage: Whether streams have to be asked for their token counts.
        needs_model: Whether a request must name a model; otherwise the default model answers.
        fields: The fields that a request must have, with their types.
        binary: Whether the answer is bytes of any type, which are passed on as they come.
    """

    name: str
    path: str
    genai: str
    read: Callable[[Mapping[str, Any]], Facts]
    count: Callable[[Mapping[str, Any]], Counts]
    read_event: ReadEvent | None = None
    ends_with_done: bool = True
    shape: Shape = "openai"
    cacheable: bool = False
    asks_for_usage: bool = False
    needs_model: bool = False
    fields: Mapping[str, tuple[type, ...]] = field(default_factory=dict)
    binary: bool = False


def number_of(value: object) -> int | None:
    """A token count; None for anything else, and for what cannot be true."""
    return value if type(value) is int and 0 <= value <= MAX_COUNT else None


def name_of(payload: Mapping[str, Any], key: str) -> str | None:
    """A name in an answer, of bounded length; None where there is none."""
    value = payload.get(key)
    return value[:MAX_NAME_CHARS] if isinstance(value, str) and value else None


def object_of(payload: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """An object in an answer; empty where there is none."""
    value = payload.get(key)
    return value if isinstance(value, dict) else {}


def objects_of(payload: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    """The objects of a list in an answer, as many as choices are permitted; empty where there is none."""
    value = payload.get(key)
    return [one for one in value[:MAX_CHOICES] if isinstance(one, dict)] if isinstance(value, list) else []


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


def _facts(payload: Mapping[str, Any], text: str, reasons: Mapping[int, str] | None = None) -> Facts:
    return Facts(
        text=text,
        id=name_of(payload, "id"),
        model=name_of(payload, "model"),
        usage=object_of(payload, "usage"),
        finish_reasons=reasons or {},
    )


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
    return _facts(payload, _text_of_output(payload), reasons)


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


def _reasons(choices: list[Mapping[str, Any]]) -> dict[int, str]:
    """The finish reasons of choices, by their index."""
    found: dict[int, str] = {}
    for place, choice in enumerate(choices):
        reason, index = choice.get("finish_reason"), number_of(choice.get("index"))
        if isinstance(reason, str):
            found[place if index is None else index] = reason[:MAX_NAME_CHARS]
    return found


# ---- Events of streams ---------------------------------------------------------------------------------


def read_completion_event(payload: Mapping[str, Any], _name: str) -> Facts:
    """An event of a completion of the older protocol."""
    choices = objects_of(payload, "choices")
    text = "".join(text_of(one.get("text")) for one in choices if one.get("index", 0) == 0)
    return Facts(
        text=text,
        id=name_of(payload, "id"),
        model=name_of(payload, "model"),
        usage=object_of(payload, "usage"),
        finish_reasons=_reasons(choices),
        content=any(one.get("text") for one in choices),
    )


RESPONSE_ENDS: Final = frozenset({"response.completed", "response.incomplete", "response.failed"})


def read_response_event(payload: Mapping[str, Any], name: str) -> Facts:
    """An event of a response; its type is in the data, and in its name too."""
    kind = text_of(payload.get("type")) or name
    response = object_of(payload, "response")
    if kind == "error":
        return Facts(error=object_of(payload, "error") or payload)
    if kind in RESPONSE_ENDS:
        read = read_response({"output": [], **response})
        # A response that failed is an answer: the client's library reads its error from the event.
        return Facts(
            id=read.id,
            model=read.model,
            usage=read.usage,
            finish_reasons=read.finish_reasons,
            ends=True,
        )
    return Facts(
        text=text_of(payload.get("delta")) if kind == "response.output_text.delta" else "",
        id=name_of(response, "id"),
        model=name_of(response, "model"),
        content=kind.endswith(".delta"),
    )


def read_message_event(payload: Mapping[str, Any], name: str) -> Facts:
    """An event of a message of Anthropic's protocol."""
    match text_of(payload.get("type")) or name:
        case "error":
            return Facts(error=object_of(payload, "error") or payload)
        case "message_start":
            message = object_of(payload, "message")
            return Facts(
                id=name_of(message, "id"), model=name_of(message, "model"), usage=object_of(message, "usage")
            )
        case "content_block_delta":
            delta = object_of(payload, "delta")
            text = text_of(delta.get("text")) if delta.get("type") == "text_delta" else ""
            return Facts(text=text, content=True)
        case "message_delta":
            reason = name_of(object_of(payload, "delta"), "stop_reason")
            return Facts(usage=object_of(payload, "usage"), finish_reasons={0: reason} if reason else {})
        case "message_stop":
            return Facts(ends=True)
        case _:
            return Facts()
