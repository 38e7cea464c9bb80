"""Puts the pieces of a streamed answer together again, into the form in which answers are kept."""

import base64
import json
import time
import zlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Self

from service.cache.keys import CacheKey
from service.errors import ServiceError
from service.upstream.messages import Completion, LlmRequest, Reply, cost_of, read_answer
from service.upstream.stream import StreamEvent, event

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


@dataclass(slots=True)
class _Kept:
    entry: Entry
    seen_s: float


class EntryMemory:
    """Keeps entries by their digest.

    Args:
        max_bytes: What all of them may take together, roughly; 0 keeps none.
        trusted_s: Seconds for which the store is not asked whether the entry is still there; None where
            nobody else can have taken it out.
        now: Unix time in seconds.
        clock: Monotonic, in seconds.
    """

    def __init__(
        self,
        max_bytes: int,
        trusted_s: float | None,
        *,
        now: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_bytes = max_bytes
        self._trusted_s = trusted_s
        self._now = now
        self._clock = clock
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self.size_bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, digest: str, *, unconfirmed: bool = False) -> Entry | None:
        """The entry, unless it is too old or, not ``unconfirmed``, seen in the store too long ago."""
        kept = self._kept.get(digest)
        if kept is None:
            return None
        if kept.entry.expires_at <= self._now():
            self.discard(digest)
            return None
        if not unconfirmed and self._trusted_s is not None and self._clock() - kept.seen_s >= self._trusted_s:
            return None
        self._kept.move_to_end(digest)
        return kept.entry

    def put(self, entry: Entry) -> None:
        """Keep the entry, instead of the one with the same digest."""
        self.discard(entry.key.digest)
        if entry.size_bytes > self._max_bytes:
            return
        self._kept[entry.key.digest] = _Kept(entry, self._clock())
        self.size_bytes += entry.size_bytes
        while self.size_bytes > self._max_bytes:
            _, oldest = self._kept.popitem(last=False)
            self.size_bytes -= oldest.entry.size_bytes

    def discard(self, digest: str) -> None:
        """Forget the entry, if it is here."""
        kept = self._kept.pop(digest, None)
        if kept is not None:
            self.size_bytes -= kept.entry.size_bytes

    def clear(self, *, tenant: str | None = None, model: str | None = None) -> int:
        """Forget all, or all of this tenant and model; how many that were."""
        gone = [
            digest
            for digest, kept in self._kept.items()
            if tenant in {None, kept.entry.key.tenant} and model in {None, kept.entry.model}
        ]
        for digest in gone:
            self.discard(digest)
        return len(gone)


EVENTS_PER_ANSWER = 64
"""A token of four letters comes in an event of two or three hundred bytes."""


class Assembler:
    """Takes the events of one answer; gives up, for good, on what it does not understand or is too large.

    Args:
        max_bytes: The largest answer that is of use; its events may be so many times as large.
    """

    def __init__(self, max_bytes: int) -> None:
        self._left_bytes = max_bytes * EVENTS_PER_ANSWER
        self._head: dict[str, Any] = {}
        self._usage: Mapping[str, Any] | None = None
        self._choices: dict[int, dict[str, Any]] = {}
        self._failed = False

    def tap(
        self, relay: Callable[[StreamEvent], Awaitable[None]]
    ) -> Callable[[StreamEvent], Awaitable[None]]:
        """Take each event once it is handed on."""

        async def hand_on(event: StreamEvent) -> None:
            await relay(event)
            self.take(event.payload, len(event.raw))

        return hand_on

    def take(self, payload: Mapping[str, Any] | None, size_bytes: int) -> None:
        """Take one event; raises nothing, whatever it holds."""
        self._left_bytes -= size_bytes
        if self._failed or payload is None or self._left_bytes < 0:
            self._failed = True
            self._choices.clear()
            return
        try:
            self._add(payload)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError):
            self._failed = True

    def reply(self, completion: Completion) -> Reply | None:
        """The whole answer; None where there is none that could be given out again."""
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
                raise TypeError("an index that is no number")
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
    """Add a piece: texts and lists go on, calls of tools by their places, the rest is taken as it is."""
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
        raise ValueError("a call of a tool out of its order")
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
