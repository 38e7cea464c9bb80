"""What a model answered: the text, the counts and the price, read from the upstream's JSON."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal, Self

from service.upstream.errors import nonsense

Operation = Literal["chat", "embeddings"]

PATHS: Final[Mapping[Operation, str]] = {"chat": "/chat/completions", "embeddings": "/embeddings"}


@dataclass(frozen=True)
class LlmRequest:
    """One request in OpenAI's shape.

    Args:
        operation: The GenAI operation.
        model: The model that is asked.
        body: The request, parsed; for telemetry, and to know the caller's words again in an error.
        content: The bytes that are sent.
        headers: More header fields for the upstream.
        verbatim: Whether the caller gets the upstream's bytes, which may hold what is not known here.
    """

    operation: Operation
    model: str
    body: Mapping[str, Any]
    content: bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    verbatim: bool = False

    @property
    def path(self) -> str:
        """Where it goes, below ``/v1``."""
        return PATHS[self.operation]

    def streamed(self) -> Self:
        """The same, asking for a stream that ends with the count of its tokens."""
        options = self.body.get("stream_options")
        if isinstance(options, dict) and options.get("include_usage") is True:
            asked: dict[str, Any] = {}
        else:
            asked = {"stream_options": {**(options or {}), "include_usage": True}}
        if self.body.get("stream") is not True:
            asked["stream"] = True
        return replace(self, body={**self.body, **asked}, content=with_fields(self.body, self.content, asked))


def with_fields(body: Mapping[str, Any], content: bytes, fields: Mapping[str, Any]) -> bytes:
    """The same object with these fields too; all that was there stays as it was written.

    Args:
        body: The object, parsed.
        content: The object as JSON; not an empty one.
        fields: What is put in. Only where one of them is there already is the whole object written anew.
    """
    if not fields:
        return content
    if fields.keys() & body.keys():
        return to_json({**body, **fields})
    return b"{" + to_json(fields)[1:-1] + b"," + content.lstrip().removeprefix(b"{")


def to_json(value: Mapping[str, Any]) -> bytes:
    """JSON without spaces, in ASCII: half a surrogate pair, too, comes out as it came in."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


MAX_NAME_CHARS = 256
MAX_COUNT = 2**53
MAX_COST = 1e9
MAX_CHOICES = 128
MAX_CONTENT_CHARS = 65_536
"""So much of a prompt, and of an answer, is kept where content is captured at all."""

COST_HEADERS = ("x-litellm-response-cost", "x-litellm-response-cost-original")
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


@dataclass(frozen=True)
class Completion:
    """A model's answer; the counts, and the cost in US dollars, are None where the upstream named none.

    ``estimated`` says that the count of the answer's tokens is that of its pieces; ``id`` and
    ``finish_reasons`` are the upstream's.
    """

    text: str
    model: str
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None
    cost: float | None = None
    estimated: bool = False
    id: str | None = None
    finish_reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reply:
    """An answer as it came, and what is read of it."""

    content: bytes
    completion: Completion


@dataclass(frozen=True)
class ModelList:
    """The list of models as it came, and its entries by their names."""

    content: bytes
    entries: Mapping[str, Mapping[str, Any]]

    @property
    def names(self) -> tuple[str, ...]:
        """The names, in the upstream's order."""
        return tuple(self.entries)


def read_models(content: bytes) -> ModelList:
    """The list in a response's body; ``UpstreamError`` where there is none."""
    listed = read_object(content).get("data")
    if not isinstance(listed, list):
        raise nonsense()
    entries = [entry for entry in listed if isinstance(entry, dict) and isinstance(entry.get("id"), str)]
    return ModelList(content, {entry["id"][:MAX_NAME_CHARS]: entry for entry in entries})


def read_object(content: bytes) -> dict[str, Any]:
    """A JSON object; ``UpstreamError`` when the bytes are none."""
    try:
        payload = json.loads(content)
    except (ValueError, RecursionError):
        raise nonsense() from None
    if not isinstance(payload, dict):
        raise nonsense()
    if SURROGATE.search(content):
        # Half an emoji, cut off by the model: valid JSON that no answer and no exporter could encode.
        cleaned: dict[str, Any] = json.loads(
            json.dumps(payload, ensure_ascii=False).encode("utf-8", "replace")
        )
        return cleaned
    return payload


def read_answer(content: bytes, headers: Mapping[str, str], request: LlmRequest) -> Reply:
    """The answer in a response's body; ``UpstreamError`` where there is none."""
    payload = read_object(content)
    if request.operation == "embeddings":
        if not isinstance(payload.get("data"), list):
            raise nonsense()
        text = ""
        reasons: tuple[str, ...] = ()
    else:
        choices = _choices(payload)
        text = _text(choices, verbatim=request.verbatim)
        reasons = tuple(
            choice["finish_reason"][:MAX_NAME_CHARS]
            for choice in choices[:MAX_CHOICES]
            if isinstance(choice, dict) and isinstance(choice.get("finish_reason"), str)
        )
    usage = counts_of(payload)
    completion = Completion(
        text=text,
        model=name_of(payload, "model") or request.model,
        prompt_tokens=count(usage.get("prompt_tokens")),
        completion_tokens=count(usage.get("completion_tokens")),
        total_tokens=count(usage.get("total_tokens")),
        cost=cost_of(headers, usage),
        id=name_of(payload, "id"),
        finish_reasons=reasons,
    )
    return Reply(content, completion)


def _choices(payload: Mapping[str, Any]) -> list[Any]:
    choices = payload.get("choices")
    if not isinstance(choices, list) or not choices:
        raise nonsense()
    return choices


def _text(choices: list[Any], *, verbatim: bool) -> str:
    message = choices[0].get("message") if isinstance(choices[0], dict) else None
    if not isinstance(message, dict):
        raise nonsense()
    text = message.get("content")
    if text is None:
        # A refusal, or a call of tools, which has no text.
        text = message.get("refusal") or ""
    if isinstance(text, str):
        return text
    if verbatim:
        return ""
    raise nonsense()


def name_of(payload: Mapping[str, Any], field: str) -> str | None:
    """A name in the answer, bounded; None where there is none."""
    value = payload.get(field)
    return value[:MAX_NAME_CHARS] if isinstance(value, str) and value else None


def counts_of(payload: Mapping[str, Any]) -> Mapping[str, Any]:
    """The answer's ``usage``; empty where there is none."""
    usage = payload.get("usage")
    return usage if isinstance(usage, dict) else {}


def count(value: object) -> int | None:
    """A number of tokens; None for anything else."""
    # One number beyond what OTLP can encode would end the export of all metrics for good.
    return value if type(value) is int and 0 <= value <= MAX_COUNT else None


def cost_of(headers: Mapping[str, str], usage: Mapping[str, Any]) -> float | None:
    """The call's price as LiteLLM reports it.

    A free model's comes in the second field only; a stream's in its count of tokens, since nobody knew it
    when the head went out (LiteLLM's setting ``include_cost_in_streaming_usage``).
    """
    for offered in (usage.get("cost"), *(headers.get(name) for name in COST_HEADERS)):
        if not isinstance(offered, (str, int, float)) or isinstance(offered, bool):
            continue
        try:
            cost = float(offered)
        except (ValueError, OverflowError):
            continue
        if math.isfinite(cost) and 0 <= cost <= MAX_COST:
            return cost
    return None
