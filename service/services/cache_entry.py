"""A stored answer: what is kept of it, and the forms in which it is given out again."""

import base64
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Self

from service.clients.llm_answers import Completion, Reply, cost_of, read_answer
from service.clients.llm_request import LlmRequest
from service.clients.llm_stream import StreamEvent
from service.clients.sse import event
from service.errors import ServiceError
from service.services.cache_key import CacheKey

WHOLE: Final = frozenset({"stop", "tool_calls", "function_call"})
"""Reasons for an answer's end that leave it whole: not its length, and not a filter."""

PACK_FROM_BYTES = 1_024
OVERHEAD_BYTES = 1_024
"""What an entry takes in memory beside its content, roughly."""

HEAD: Final = ("id", "created", "model", "system_fingerprint", "service_tier")
NOT_IN_A_DELTA: Final = frozenset({"role", "content", "tool_calls"})


class DamagedEntryError(ValueError):
    """What the store gave back is no entry, or not the one that was asked for."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One answer.

    Args:
        key: Where it is kept, and whose it is.
        model: The model that was asked for.
        created_at: Unix time in seconds.
        expires_at: Unix time in seconds.
        content: The answer as ``chat.completion`` JSON, the upstream's bytes where it gave it whole.
        completion: What is read of it; its cost is what it did cost once.
    """

    key: CacheKey
    model: str
    created_at: float
    expires_at: float
    content: bytes
    completion: Completion

    @property
    def size_bytes(self) -> int:
        """What it takes in memory, roughly."""
        return len(self.content) + len(self.completion.text) + OVERHEAD_BYTES

    @property
    def saved_tokens(self) -> int:
        """Tokens that giving it out again does not cost."""
        return tokens_of(self.completion)

    def as_payload(self) -> dict[str, Any]:
        """What the store keeps: the answer, and nothing of the question."""
        return {
            "key": self.key.digest,
            "tenant": self.key.tenant,
            "model": self.model,
            "created": self.created_at,
            "expires": self.expires_at,
            "cost": self.completion.cost,
            **_packed(self.content),
        }

    @classmethod
    def from_payload(cls, key: CacheKey, payload: Mapping[str, Any]) -> Self:
        """The entry that the store gave back.

        Raises:
            DamagedEntryError: It is none, or another one than was asked for.
        """
        if (payload.get("key"), payload.get("tenant")) != (key.digest, key.tenant):
            raise DamagedEntryError("another key")
        try:
            content = _unpacked(payload)
            model, created, expires = str(payload["model"]), payload["created"], payload["expires"]
            reply = read_answer(content, {}, LlmRequest("chat", model, {}, b"", verbatim=True))
            created_at, expires_at = float(created), float(expires)
        except (ServiceError, KeyError, TypeError, ValueError, AttributeError, zlib.error) as error:
            raise DamagedEntryError(type(error).__name__) from None
        if not is_whole(content, reply.completion):
            raise DamagedEntryError("not whole")
        cost = cost_of({}, {"cost": payload.get("cost")})
        return cls(key, model, created_at, expires_at, content, replace(reply.completion, cost=cost))

    def reply(self) -> Reply:
        """The answer, for a caller who pays nothing for it."""
        return Reply(self.content, replace(self.completion, cost=0.0))

    def events(self) -> Iterator[StreamEvent]:
        """The answer as the events of a stream, each choice in as few pieces as the protocol has."""
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
    """The tokens that an answer took, question and answer together."""
    if completion.total_tokens is not None:
        return completion.total_tokens
    return (completion.prompt_tokens or 0) + (completion.completion_tokens or 0)


def entry_of(  # noqa: PLR0913 - an answer, where it goes, and the bounds
    key: CacheKey, model: str, reply: Reply, *, now: float, ttl_s: float, max_bytes: int
) -> Entry | None:
    """The entry to keep for an answer; None where it is not one to be kept.

    Args:
        key: Where it is kept.
        model: The model that was asked for.
        reply: The answer.
        now: Unix time in seconds.
        ttl_s: Seconds for which it is good.
        max_bytes: The largest content that is kept.
    """
    content = reply.content
    if len(content) > max_bytes or not is_whole(content, reply.completion):
        return None
    return Entry(key, model, now, now + ttl_s, content, reply.completion)


def is_whole(content: bytes, completion: Completion) -> bool:
    """Whether each choice ended of its own accord, with no refusal among them."""
    if not completion.finish_reasons or not WHOLE.issuperset(completion.finish_reasons):
        return False
    try:
        # As it is stored, it is UTF-8; JSON may be something else.
        choices = json.loads(content.decode())["choices"]
        refused = any((choice.get("message") or {}).get("refusal") for choice in choices)
    except (ValueError, KeyError, TypeError, AttributeError):
        return False
    return not refused and len(choices) == len(completion.finish_reasons)


def _packed(content: bytes) -> dict[str, str]:
    if len(content) >= PACK_FROM_BYTES:
        packed = base64.b85encode(zlib.compress(content, 1)).decode()
        if len(packed) < len(content):
            return {"packed": packed}
    return {"body": content.decode()}


def _unpacked(payload: Mapping[str, Any]) -> bytes:
    if "packed" in payload:
        return zlib.decompress(base64.b85decode(payload["packed"]))
    return str(payload["body"]).encode()


def _chunk(head: Mapping[str, Any], choices: list[Any], text: str = "") -> StreamEvent:
    payload = {**head, "choices": choices}
    return StreamEvent(event(json.dumps(payload, separators=(",", ":")).encode()), text)


def _delta(message: Mapping[str, Any]) -> dict[str, Any]:
    """A whole message as the one piece of a stream; calls of tools have their places there."""
    delta: dict[str, Any] = {"role": message.get("role", "assistant"), "content": message.get("content")}
    calls = message.get("tool_calls")
    if isinstance(calls, list):
        delta["tool_calls"] = [
            {"index": place, **call} for place, call in enumerate(calls) if isinstance(call, dict)
        ]
    delta.update(
        {name: value for name, value in message.items() if name not in NOT_IN_A_DELTA and value is not None}
    )
    return delta
