"""Requests to a model, and what is read from its answer: the text, the token counts and the cost."""

import json
import logging
import math
import re
import threading
import time
from codecs import BOM_UTF8
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Self

from cachetools import TTLCache

from service.upstream.errors import answer_too_large, error_of, from_event, invalid_answer
from service.upstream.large_answers import LARGE_BYTES, read_large
from service.upstream.operations import (
    MAX_CHOICES,
    MAX_NAME_CHARS,
    OPERATIONS,
    Facts,
    NoAnswerError,
    OperationName,
    number_of,
)
from service.upstream.upload import Upload


@dataclass(frozen=True)
class LlmRequest:
    """One request in OpenAI's format.

    Args:
        operation: Names what is asked, in ``OPERATIONS``.
        model: The model that is asked.
        body: The request, parsed; for telemetry, and to recognise the caller's text in an upstream's error.
        content: The bytes that are sent.
        headers: Additional header fields for the upstream.
        verbatim: Whether the caller gets the upstream's bytes unchanged; then a content of an unknown type is
            not an invalid answer.
        upload: Of a form with files, what is sent instead of ``content``.
        path: Where it goes, below ``/v1``, where that is not the operation's path: with an id and a query.
    """

    operation: OperationName
    model: str
    body: Mapping[str, Any]
    content: bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    verbatim: bool = False
    upload: Upload | None = None
    path: str | None = None

    @property
    def asks_for_usage(self) -> bool:
        """Whether the caller asks for token counts at the end of a stream."""
        options = self.body.get("stream_options")
        return isinstance(options, dict) and options.get("include_usage") is True

    def streamed(self, *, with_usage: bool) -> Self:
        """The same request for a stream; ``with_usage`` asks for token counts in its last event."""
        asked: dict[str, Any] = {}
        if with_usage and not self.asks_for_usage:
            asked["stream_options"] = {**(self.body.get("stream_options") or {}), "include_usage": True}
        if self.body.get("stream") is not True:
            asked["stream"] = True
        return replace(self, body={**self.body, **asked}, content=with_fields(self.body, self.content, asked))


def with_fields(body: Mapping[str, Any], content: bytes, fields: Mapping[str, Any]) -> bytes:
    """A JSON object with these fields added; the rest keeps its bytes.

    Args:
        body: The object, parsed.
        content: The object as JSON; it has at least one field.
        fields: What is added. If the object has one of these fields already, it is serialised anew.
    """
    if not fields:
        return content
    if fields.keys() & body.keys():
        return to_json({**body, **fields})
    return b"{" + to_json(fields)[1:-1] + b"," + content.lstrip().removeprefix(b"{")


def to_json(value: Mapping[str, Any]) -> bytes:
    """JSON without spaces, in ASCII; an unpaired surrogate is kept as its escape."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


MAX_MODELS_BYTES = 2_097_152
"""The largest list of models. All of it becomes objects, which holds up the process for some 30 ms."""

MAX_COST = 1_000.0
"""The largest cost of one call that is believed, in US dollars."""

UNUSABLE_INTERVAL_S = 3_600.0
MAX_UNUSABLE = 100
"""How often an unusable number of one model is logged, and how many of them in that time."""

MAX_CONTENT_CHARS = 65_536
"""How much of a prompt, and of an answer, is kept where a setting lets content be captured."""

COUNTS: Final = ("prompt_tokens", "completion_tokens", "total_tokens", "input_tokens", "output_tokens")
COST_HEADER = "x-litellm-response-cost"
ORIGINAL_COST_HEADER = "x-litellm-response-cost-original"
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Completion:
    """What is known of a model's answer.

    The token counts, and the cost in US dollars, are None where the upstream sent none. ``estimated`` is true
    where the number of a stream's events stands in for its completion tokens. ``id`` and ``finish_reasons``
    are the upstream's. The tokens of the provider's cache are a part of the prompt's, those of reasoning a
    part of the completion's. ``item_ids`` are those of a response's items.
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
    cache_read_tokens: int | None = None
    cache_write_tokens: int | None = None
    reasoning_tokens: int | None = None
    item_ids: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reply:
    """An answer's bytes, and what was read from them."""

    content: bytes
    completion: Completion


@dataclass(frozen=True)
class ModelList:
    """The list of models: its bytes, and its entries by name."""

    content: bytes
    entries: Mapping[str, Mapping[str, Any]]

    @property
    def names(self) -> tuple[str, ...]:
        """The names, in the upstream's order."""
        return tuple(self.entries)

    def only(self, models: Container[str] | None) -> "ModelList":
        """The list without the models that are not among these; None stands for all."""
        if models is None:
            return self
        entries = {name: entry for name, entry in self.entries.items() if name in models}
        content = json.dumps({"object": "list", "data": list(entries.values())}).encode()
        return ModelList(content, entries)


def read_models(content: bytes) -> ModelList:
    """Read the list of models in a response's body; ``UpstreamError`` if it is not one, or too large."""
    if len(content) > MAX_MODELS_BYTES:
        raise answer_too_large()
    listed = read_object(content).get("data")
    if not isinstance(listed, list):
        raise invalid_answer()
    entries = [entry for entry in listed if isinstance(entry, dict) and isinstance(entry.get("id"), str)]
    return ModelList(content, {entry["id"][:MAX_NAME_CHARS]: entry for entry in entries})


def read_object(content: bytes) -> dict[str, Any]:
    """Read a JSON object; ``UpstreamError`` if the bytes are not one in UTF-8."""
    try:
        # Of bytes, json would take UTF-16 too, and halves of a surrogate pair that are no UTF-8.
        payload = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        raise invalid_answer() from None
    if not isinstance(payload, dict):
        raise invalid_answer()
    if SURROGATE.search(content):
        # A model may cut an emoji in half. Such a surrogate is valid JSON, and cannot be encoded in UTF-8.
        cleaned: dict[str, Any] = json.loads(
            json.dumps(payload, ensure_ascii=False).encode("utf-8", "replace")
        )
        return cleaned
    return payload


def read_needed(content: bytes, *, in_part: bool = True) -> dict[str, Any]:
    """Read an answer; ``UpstreamError`` if it is no object.

    Args:
        content: The answer.
        in_part: Whether only what this service needs is read of a large one.
    """
    if len(content) <= LARGE_BYTES or not in_part:
        return read_object(content)
    # One choice more than are permitted, so that too many are seen to be too many.
    return read_large(content.removeprefix(BOM_UTF8), MAX_CHOICES + 1)


def failure_in(payload: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The error in a whole answer; a response has a field for it, and is an answer also where it failed."""
    return None if payload.get("object") == "response" else error_of(payload)


def read_answer(
    content: bytes, headers: Mapping[str, str], request: LlmRequest, *, known_model: bool
) -> Reply:
    """Read the answer in a response's body.

    Raises:
        UpstreamError: It is no answer.
        ServiceError: It is an error with the status of an answer.
    """
    payload = read_needed(content, in_part=OPERATIONS[request.operation].partly_read)
    error = failure_in(payload)
    if error is not None:
        # Beside choices too: they are a part of an answer, and would be stored as a whole one.
        raise from_event(error, headers, request.body, known_model=known_model)
    try:
        facts = OPERATIONS[request.operation].read(payload)
    except NoAnswerError:
        raise invalid_answer() from None
    if facts.text is None and not request.verbatim:
        raise invalid_answer()
    return Reply(content, completion_of(request, facts, headers))


def completion_of(
    request: LlmRequest, facts: Facts, headers: Mapping[str, str], pieces: int = 0
) -> Completion:
    """What is known of an answer.

    Args:
        request: What was asked.
        facts: What was read from the answer, whole or as far as it came.
        headers: Its header fields, which may hold the cost.
        pieces: The number of a stream's pieces, which stand in for tokens where there is no count.
    """
    unusable_numbers.log(request.model, headers, facts.usage)
    operation = OPERATIONS[request.operation]
    counts = operation.count(facts.usage)
    estimated = counts.completion is None and pieces > 0
    return Completion(
        text=facts.text or "",
        model=facts.model or request.model,
        prompt_tokens=counts.prompt,
        completion_tokens=pieces if estimated else counts.completion,
        total_tokens=counts.total,
        cost=None if operation.stored else cost_of(headers, facts.usage),
        estimated=estimated,
        id=facts.id,
        finish_reasons=tuple(reason for _, reason in sorted(facts.finish_reasons.items())),
        cache_read_tokens=counts.cache_read,
        cache_write_tokens=counts.cache_write,
        reasoning_tokens=counts.reasoning,
        item_ids=facts.item_ids,
    )


def cost_of(headers: Mapping[str, str], usage: Mapping[str, Any]) -> float | None:
    """The call's cost as LiteLLM reports it; None where it reports none that can be true.

    A free model's cost is in the second field only. A stream's is in its ``usage``, because it is not known
    when the head is sent (LiteLLM's setting ``include_cost_in_streaming_usage``).
    """
    for _place, offered in _offered_costs(headers, usage):
        cost = _number(offered)
        if 0 <= cost <= MAX_COST:
            return cost
    return None


def _offered_costs(headers: Mapping[str, str], usage: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """Each place where the upstream puts the cost, with what is there."""
    yield "usage.cost", usage.get("cost")
    for name in (COST_HEADER, ORIGINAL_COST_HEADER):
        yield name, headers.get(name)


def _number(value: object) -> float:
    """The value of a number, or of a text that is one; NaN for anything else."""
    if not isinstance(value, (str, int, float)) or isinstance(value, bool):
        return math.nan
    try:
        return float(value)
    except ValueError:
        return math.nan
    except OverflowError:
        return math.inf


class UnusableNumbers:
    """Logs token counts and costs of the upstream that cannot be true and are taken for unknown.

    Each model is logged once an hour and place, so that neither an upstream with a fault in its price list
    nor a caller who asks for many names fills the log; thread-safe.

    Args:
        clock: Monotonic, in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._lock = threading.Lock()
        self._logged: TTLCache[tuple[str, str], bool] = TTLCache(MAX_UNUSABLE, UNUSABLE_INTERVAL_S, clock)

    def log(self, model: str, headers: Mapping[str, str], usage: Mapping[str, Any]) -> None:
        """Log what is unusable in an answer and was not logged for this model within the last hour."""
        for place, problem in _unusable(headers, usage):
            if self._is_new((model, place)):
                # Without the value: it is any text that the upstream likes.
                logger.warning(
                    "The upstream's answer has a number that cannot be true, which counts as unknown",
                    extra={"model": model[:MAX_NAME_CHARS], "place": place, "problem": problem},
                )

    def _is_new(self, key: tuple[str, str]) -> bool:
        with self._lock:
            self._logged.expire()
            if key in self._logged or len(self._logged) >= MAX_UNUSABLE:
                return False
            self._logged[key] = True
            return True


def _unusable(headers: Mapping[str, str], usage: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The place of each unusable number, and what is wrong with it."""
    for name in COUNTS:
        tokens = usage.get(name)
        if tokens is not None and number_of(tokens) is None:
            whole = type(tokens) is int
            yield f"usage.{name}", _problem(tokens) if whole else "not a whole number"
    for place, cost in _offered_costs(headers, usage):
        if cost is not None and not 0 <= _number(cost) <= MAX_COST:
            yield place, _problem(_number(cost))


def _problem(value: float) -> str:
    if math.isnan(value):
        return "not a number"
    return "negative" if value < 0 else "too large"


unusable_numbers: Final = UnusableNumbers()
"""Those of this process."""
