"""Cached answers: which are stored, in which form, and how they are kept in memory."""

import base64
import json
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final, Self

from service.cache.assembly import Layout, can_be_streamed
from service.cache.keys import CacheKey
from service.cache.store import Point
from service.errors import ServiceError
from service.upstream.messages import Completion, Reply, cost_of, read_needed
from service.upstream.operations import MAX_CHOICES, name_of, number_of, object_of
from service.upstream.stream import StreamEvent

COMPLETE: Final = frozenset({"stop", "tool_calls", "function_call"})
"""Finish reasons of a complete answer: neither a length limit nor a content filter cut it off."""

COMPRESS_FROM_BYTES = 1_024
MAX_CONTENT_BYTES: Final = 1 << 26
"""Largest answer that is unpacked: what a store returns may unpack to more than there is memory."""

OVERHEAD_BYTES = 1_024
"""Approximate size of an entry in memory beside its content."""


class DamagedEntryError(ValueError):
    """The store returned a payload that is no entry, or the entry of another key."""


@dataclass(frozen=True)
class Entry:
    """A stored answer.

    Args:
        key: Identifies the question, and whose answer it is.
        model: The model that was asked.
        created_at: Unix time in seconds.
        expires_at: Unix time in seconds.
        content: The answer as ``chat.completion`` JSON: the upstream's bytes, unless it was streamed.
        completion: What was read from it; its cost is that of the call that it was made for.
        layout: Where in a stream its fields are, as JSON; empty where they are in every event.
    """

    key: CacheKey
    model: str
    created_at: float
    expires_at: float
    content: bytes
    completion: Completion
    layout: bytes = b""

    @property
    def size_bytes(self) -> int:
        """Approximate size in memory."""
        return len(self.content) + len(self.layout) + len(self.completion.text) + OVERHEAD_BYTES

    def point(self) -> Point:
        """The entry as it is stored: the answer, and nothing of the question."""
        payload = {
            "key": self.key.digest,
            "tenant": self.key.tenant,
            "model": self.model,
            "created": self.created_at,
            "expires": self.expires_at,
            "cost": self.completion.cost,
            **({"layout": self.layout.decode()} if self.layout else {}),
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
            layout = str(payload.get("layout", "")).encode()
            if layout and len(Layout.from_json(layout).choices) != len(choices):
                raise DamagedEntryError("layout")
            text = choices[0]["message"].get("content") if choices else None
        except (
            *(ServiceError, KeyError, TypeError, ValueError, OverflowError, AttributeError),
            *(RecursionError, zlib.error),
        ) as error:
            raise DamagedEntryError(type(error).__name__) from None
        if not choices:
            raise DamagedEntryError("not whole")
        usage = object_of(answer, "usage")
        completion = Completion(
            text=text if isinstance(text, str) else "",
            model=name_of(answer, "model") or model,
            prompt_tokens=number_of(usage.get("prompt_tokens")),
            completion_tokens=number_of(usage.get("completion_tokens")),
            total_tokens=number_of(usage.get("total_tokens")),
            cost=cost_of({}, {"cost": payload.get("cost")}),
            id=name_of(answer, "id"),
            finish_reasons=tuple(choice["finish_reason"] for choice in choices),
        )
        return cls(key, model, created_at, expires_at, content, completion, layout)

    def as_json(self) -> bytes:
        """The payload of its point, for another process."""
        return json.dumps(self.point().payload, separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, key: CacheKey, content: bytes) -> Self:
        """The entry in a payload as JSON; raises ``DamagedEntryError`` as ``from_payload`` does."""
        try:
            payload = json.loads(content)
        except (ValueError, RecursionError):
            raise DamagedEntryError("not JSON") from None
        if not isinstance(payload, dict):
            raise DamagedEntryError("not an object")
        return cls.from_payload(key, payload)

    def reply(self) -> Reply:
        """The answer for a caller who is not billed for it."""
        return self._free

    @cached_property
    def _free(self) -> Reply:
        return Reply(self.content, replace(self.completion, cost=0.0))

    def events(self) -> Iterator[StreamEvent]:
        """The answer as a stream."""
        answer = json.loads(self.content)
        layout = Layout.from_json(self.layout) if self.layout else Layout.of(answer)
        return layout.events(answer)


def tokens_of(completion: Completion) -> int:
    """The tokens of a question and its answer together."""
    if completion.total_tokens is not None:
        return completion.total_tokens
    return (completion.prompt_tokens or 0) + (completion.completion_tokens or 0)


def is_complete(reply: Reply) -> bool:
    """Whether an answer may be stored: each choice says something and came to its natural end."""
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
    """The choices of an answer; none of them unless all are complete.

    A refusal is not complete, nor is a choice with neither text nor a call of a tool, nor one that would be
    another when it is replayed as a stream.

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
    for place, choice in enumerate(choices):
        message = choice["message"]
        if choice.get("finish_reason") not in COMPLETE or message.get("refusal"):
            return []
        if not _says_something(message) or not can_be_streamed(choice, place):
            return []
    return list(choices)


def _says_something(message: Mapping[str, Any]) -> bool:
    """Whether a message has text that is not blank, or a call of a tool; its thoughts do not count."""
    content = message.get("content")
    if not isinstance(content, str | None):
        return False
    calls = bool(message.get("tool_calls")) or bool(message.get("function_call"))
    return calls or bool(content and content.strip())


def _packed(content: bytes) -> dict[str, str]:
    if len(content) >= COMPRESS_FROM_BYTES:
        packed = base64.b64encode(zlib.compress(content, 1)).decode()
        if len(packed) < len(content):
            return {"packed": packed}
    return {"body": content.decode()}


def _unpacked(payload: Mapping[str, Any]) -> bytes:
    if "packed" in payload:
        unpacking = zlib.decompressobj()
        content = unpacking.decompress(base64.b64decode(payload["packed"], validate=True), MAX_CONTENT_BYTES)
        if not unpacking.eof:
            raise DamagedEntryError("size")
        return content
    return str(payload["body"]).encode()


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
