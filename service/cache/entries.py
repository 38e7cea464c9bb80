"""Cached answers: how they are stored, kept in memory, and put together from a stream."""

import base64
import json
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Self

from service.cache.keys import CacheKey
from service.cache.store import Point
from service.errors import ServiceError
from service.upstream.messages import (
    MAX_CHOICES,
    Completion,
    Reply,
    cost_of,
    count,
    counts_of,
    name_of,
    read_needed,
)
from service.upstream.stream import StreamEvent, event

COMPLETE: Final = frozenset({"stop", "tool_calls", "function_call"})
"""Finish reasons of a complete answer: neither a length limit nor a content filter cut it off."""

COMPRESS_FROM_BYTES = 1_024
OVERHEAD_BYTES = 1_024
"""Approximate size of an entry in memory beside its content."""

HEAD: Final = ("id", "created", "model", "system_fingerprint", "service_tier")
HANDLED_IN_DELTA: Final = frozenset({"role", "content", "tool_calls"})


class DamagedEntryError(ValueError):
    """The store returned a payload that is no entry, or the entry of another key."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A stored answer.

    Args:
        key: Identifies the question, and whose answer it is.
        model: The model that was asked.
        created_at: Unix time in seconds.
        expires_at: Unix time in seconds.
        content: The answer as ``chat.completion`` JSON: the upstream's bytes, unless it was streamed.
        completion: What was read from it; its cost is that of the call that it was made for.
    """

    key: CacheKey
    model: str
    created_at: float
    expires_at: float
    content: bytes
    completion: Completion

    @property
    def size_bytes(self) -> int:
        """Approximate size in memory."""
        return len(self.content) + len(self.completion.text) + OVERHEAD_BYTES

    def point(self) -> Point:
        """The entry as it is stored: the answer, and nothing of the question."""
        payload = {
            "key": self.key.digest,
            "tenant": self.key.tenant,
            "model": self.model,
            "created": self.created_at,
            "expires": self.expires_at,
            "cost": self.completion.cost,
            **_packed(self.content),
        }
        return Point(self.key.point_id, payload)

    @classmethod
    def from_payload(cls, key: CacheKey, payload: Mapping[str, Any]) -> Self:
        """The entry in a point's payload, whose content is parsed here.

        Raises:
            DamagedEntryError: It is no entry, or the entry of another key.
        """
        if (payload.get("key"), payload.get("tenant")) != (key.digest, key.tenant):
            raise DamagedEntryError("another key")
        try:
            content = _unpacked(payload)
            model, created, expires = str(payload["model"]), payload["created"], payload["expires"]
            content.decode()  # JSON may have another encoding; what this service stores is UTF-8
            answer = read_needed(content)
            created_at, expires_at = float(created), float(expires)
            choices = complete_choices(answer)
            text = choices[0]["message"].get("content") if choices else None
        except (ServiceError, KeyError, TypeError, ValueError, AttributeError, zlib.error) as error:
            raise DamagedEntryError(type(error).__name__) from None
        if not choices:
            raise DamagedEntryError("not whole")
        usage = counts_of(answer)
        completion = Completion(
            text=text if isinstance(text, str) else "",
            model=name_of(answer, "model") or model,
            prompt_tokens=count(usage.get("prompt_tokens")),
            completion_tokens=count(usage.get("completion_tokens")),
            total_tokens=count(usage.get("total_tokens")),
            cost=cost_of({}, {"cost": payload.get("cost")}),
            id=name_of(answer, "id"),
            finish_reasons=tuple(choice["finish_reason"] for choice in choices),
        )
        return cls(key, model, created_at, expires_at, content, completion)

    def reply(self) -> Reply:
        """The answer for a caller who is not billed for it."""
        return Reply(self.content, replace(self.completion, cost=0.0))

    def events(self) -> Iterator[StreamEvent]:
        """The answer as a stream: for each choice one event with all of it, and one with its end."""
        payload = json.loads(self.content)
        head = {name: payload[name] for name in HEAD if name in payload}
        head["object"] = "chat.completion.chunk"
        for place, choice in enumerate(payload["choices"]):
            index = choice.get("index", place)
            message = choice.get("message") or {}
            more = {"logprobs": choice["logprobs"]} if choice.get("logprobs") else {}
            text = message.get("content")
            yield _chunk(
                head,
                [{"index": index, "delta": _delta(message), "finish_reason": None, **more}],
                text if index == 0 and isinstance(text, str) else "",
            )
            yield _chunk(head, [{"index": index, "delta": {}, "finish_reason": choice.get("finish_reason")}])
        if isinstance(payload.get("usage"), dict):
            yield replace(_chunk({**head, "usage": payload["usage"]}, []), usage_only=True)


def tokens_of(completion: Completion) -> int:
    """The tokens of a question and its answer together."""
    if completion.total_tokens is not None:
        return completion.total_tokens
    return (completion.prompt_tokens or 0) + (completion.completion_tokens or 0)


def is_complete(reply: Reply) -> bool:
    """Whether an answer may be stored: each choice came to its natural end, and none is a refusal."""
    reasons = reply.completion.finish_reasons
    if not reasons or not COMPLETE.issuperset(reasons):
        return False
    try:
        # Entries are stored as UTF-8; JSON may have another encoding.
        reply.content.decode()
        choices = complete_choices(read_needed(reply.content))
    except (ServiceError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False
    return len(choices) == len(reasons)


def complete_choices(answer: Mapping[str, Any]) -> list[Any]:
    """The choices of an answer; none of them unless all are complete and none is a refusal.

    Args:
        answer: The parsed answer, which may be anything that JSON can express.

    Raises:
        KeyError: It is no ``chat.completion``.
        TypeError: As ``KeyError``.
        AttributeError: As ``KeyError``.
    """
    choices = answer["choices"]
    if len(choices) > MAX_CHOICES:
        return []
    for choice in choices:
        if choice.get("finish_reason") not in COMPLETE or (choice.get("message") or {}).get("refusal"):
            return []
    return list(choices)


def _packed(content: bytes) -> dict[str, str]:
    if len(content) >= COMPRESS_FROM_BYTES:
        packed = base64.b64encode(zlib.compress(content, 1)).decode()
        if len(packed) < len(content):
            return {"packed": packed}
    return {"body": content.decode()}


def _unpacked(payload: Mapping[str, Any]) -> bytes:
    if "packed" in payload:
        return zlib.decompress(base64.b64decode(payload["packed"], validate=True))
    return str(payload["body"]).encode()


def _chunk(head: Mapping[str, Any], choices: list[Any], text: str = "") -> StreamEvent:
    payload = {**head, "choices": choices}
    return StreamEvent(event(json.dumps(payload, separators=(",", ":")).encode()), text)


def _delta(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as the only delta of a stream, where tool calls have an index."""
    delta: dict[str, Any] = {"role": message.get("role", "assistant"), "content": message.get("content")}
    calls = message.get("tool_calls")
    if isinstance(calls, list):
        delta["tool_calls"] = [
            {"index": place, **call} for place, call in enumerate(calls) if isinstance(call, dict)
        ]
    delta.update(
        {name: value for name, value in message.items() if name not in HANDLED_IN_DELTA and value is not None}
    )
    return delta


@dataclass(slots=True)
class _Remembered:
    entry: Entry
    confirmed_s: float


class EntryMemory:
    """The entries used last, by their digests.

    Args:
        max_bytes: Limit of their approximate size together; 0 keeps none.
        fresh_s: Seconds after which an entry is stale: it may have been removed from the store by another
            process. None where no other process uses the store.
        now: Unix time in seconds.
        clock: Monotonic, in seconds.
    """

    def __init__(
        self,
        max_bytes: int,
        fresh_s: float | None,
        *,
        now: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_bytes = max_bytes
        self._fresh_s = fresh_s
        self._now = now
        self._clock = clock
        self._entries: OrderedDict[str, _Remembered] = OrderedDict()
        self.size_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, digest: str, *, allow_stale: bool = False) -> Entry | None:
        """The entry; None where there is none, it has expired, or it is stale and that is not allowed."""
        found = self._entries.get(digest)
        if found is None:
            return None
        if found.entry.expires_at <= self._now():
            self.discard(digest)
            return None
        if (
            not allow_stale
            and self._fresh_s is not None
            and self._clock() - found.confirmed_s >= self._fresh_s
        ):
            return None
        self._entries.move_to_end(digest)
        return found.entry

    def put(self, entry: Entry) -> None:
        """Add the entry or replace it; those not used for longest are evicted when memory is full."""
        self.discard(entry.key.digest)
        if entry.size_bytes > self._max_bytes:
            return
        self._entries[entry.key.digest] = _Remembered(entry, self._clock())
        self.size_bytes += entry.size_bytes
        while self.size_bytes > self._max_bytes:
            _, oldest = self._entries.popitem(last=False)
            self.size_bytes -= oldest.entry.size_bytes

    def discard(self, digest: str) -> None:
        """Remove the entry, if it is here."""
        found = self._entries.pop(digest, None)
        if found is not None:
            self.size_bytes -= found.entry.size_bytes

    def clear(self, *, tenant: str | None = None, model: str | None = None) -> None:
        """Remove all entries, or those of this tenant and this model."""
        digests = [
            digest
            for digest, found in self._entries.items()
            if tenant in {None, found.entry.key.tenant} and model in {None, found.entry.model}
        ]
        for digest in digests:
            self.discard(digest)


EVENTS_PER_ANSWER = 64
"""Bytes of a stream's events for one byte of the answer, at most: a token of four letters comes in an event
of two or three hundred bytes."""


class Assembler:
    """Puts the events of one stream together into an answer.

    It gives up for good on events that it does not understand, and on an answer that is too large.

    Args:
        max_bytes: The largest answer that may be stored; 0 takes nothing.
    """

    def __init__(self, max_bytes: int) -> None:
        self._left_bytes = max_bytes * EVENTS_PER_ANSWER
        self._head: dict[str, Any] = {}
        self._usage: Mapping[str, Any] | None = None
        self._choices: dict[int, dict[str, Any]] = {}
        self._failed = max_bytes == 0

    def take(self, payload: Mapping[str, Any] | None, size_bytes: int) -> None:
        """Take one event; raises nothing, whatever it contains."""
        if self._failed:
            return
        self._left_bytes -= size_bytes
        if payload is None or self._left_bytes < 0:
            self._failed = True
            self._choices.clear()
            return
        try:
            self._add(payload)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError):
            self._failed = True

    def reply(self, completion: Completion) -> Reply | None:
        """The answer as if it had not been streamed; None where there is none to be stored.

        Args:
            completion: What the stream knows of the answer.
        """
        if self._failed or not self._choices:
            return None
        choices = [choice for _, choice in sorted(self._choices.items())]
        payload = {
            **self._head,
            "object": "chat.completion",
            "choices": choices,
            **({"usage": self._usage} if self._usage else {}),
        }
        text = choices[0]["message"].get("content") or ""
        if not isinstance(text, str):
            return None
        return Reply(json.dumps(payload, separators=(",", ":")).encode(), replace(completion, text=text))

    def _add(self, payload: Mapping[str, Any]) -> None:
        for name in HEAD:
            if payload.get(name) is not None:
                self._head.setdefault(name, payload[name])
        if isinstance(payload.get("usage"), dict):
            self._usage = payload["usage"]
        for given in payload.get("choices") or ():
            index = given.get("index", 0)
            if type(index) is not int:
                raise TypeError("the index of a choice is no integer")
            choice = self._choices.setdefault(
                index,
                {"index": index, "message": {"role": "assistant", "content": None}, "finish_reason": None},
            )
            _merge(choice["message"], given.get("delta") or {})
            if given.get("finish_reason") is not None:
                choice["finish_reason"] = given["finish_reason"]
            if isinstance(given.get("logprobs"), dict):
                _merge(choice.setdefault("logprobs", {}), given["logprobs"])


def _merge(whole: dict[str, Any], piece: Mapping[str, Any]) -> None:
    """Add a delta: strings and lists are appended, tool calls go by their index, other values replace."""
    for name, value in piece.items():
        if value is None:
            whole.setdefault(name, None)
        elif name == "tool_calls":
            for call in value:
                _merge_call(whole, call)
        elif isinstance(value, str) and isinstance(whole.get(name), str) and name != "role":
            whole[name] += value
        elif isinstance(value, list) and isinstance(whole.get(name), list):
            whole[name] = [*whole[name], *value]
        elif isinstance(value, dict) and isinstance(whole.get(name), dict):
            _merge(whole[name], value)
        else:
            whole[name] = dict(value) if isinstance(value, dict) else value


def _merge_call(message: dict[str, Any], call: Mapping[str, Any]) -> None:
    place = call.get("index", 0)
    calls: list[dict[str, Any]] = message.setdefault("tool_calls", None) or []
    message["tool_calls"] = calls
    if type(place) is not int or place > len(calls):
        raise ValueError("a tool call is out of order")
    if place == len(calls):
        calls.append({})
    known = calls[place]
    for name, value in call.items():
        if name == "index" or value is None:
            continue
        if name == "function":
            function = known.setdefault("function", {"name": "", "arguments": ""})
            for part in ("name", "arguments"):
                function[part] += value.get(part) or ""
            function.update({n: v for n, v in value.items() if n not in {"name", "arguments"}})
        else:
            known.setdefault(name, value)
