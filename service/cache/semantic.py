"""Questions with the same meaning, found by their vectors; the guard is in ``service/cache/guard.py``."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from service.cache.entries import Entry
from service.cache.guard import guard_of
from service.cache.keys import CacheKey, scope_of
from service.cache.store import COLLECTION, Breaker, Found, GuardedStore, Point, StoreError, equal_to
from service.config.settings import Settings
from service.errors import ServiceError, UpstreamError
from service.upstream.client import LlmClient
from service.upstream.messages import LlmRequest, to_json
from service.utils.deadline import Deadline

MAX_QUESTION_CHARS = 2_000
"""A longer text is more than one question, and embedding models read the first 256 or 512 tokens only."""

MAX_DEADLINE_SHARE = 0.1
"""Share of the call's remaining time that making a vector may take."""

MAX_DIMENSION = 16_384
CANDIDATES = 3


@dataclass(frozen=True, slots=True)
class Question:
    """A question that can be compared by meaning.

    Args:
        scope: A hash of all that must be equal beside the meaning; 64 hex digits.
        vector: The embedding of the last message.
        collection: The collection of this embedding model's vectors.
    """

    scope: str
    vector: Sequence[float]
    collection: str


@dataclass(frozen=True, slots=True)
class Match:
    """A stored question that counts as the same, and the key of its answer."""

    key: CacheKey
    similarity: float
    point_id: str
    collection: str


class SemanticIndex:
    """Finds stored questions by their meaning.

    Args:
        llm: Makes the vectors.
        store: Where they are stored.
        settings: The embedding model, the threshold, and the time limit.
        breaker: The circuit breaker of the embedding model.
    """

    def __init__(self, llm: LlmClient, store: GuardedStore, settings: Settings, breaker: Breaker) -> None:
        self._llm = llm
        self._store = store
        self._model = settings.embedding_model
        self._threshold = settings.cache_similarity
        self._timeout_s = settings.cache_embedding_timeout_s
        self._breaker = breaker

    async def question(
        self, tenant: str, model: str, body: Mapping[str, Any], deadline: Deadline
    ) -> Question | None:
        """The question in a request; None where it has none that can be compared by meaning.

        Raises:
            StoreError: The embedding model did not return its vector in time.
        """
        text = last_question(body)
        if text is None:
            return None
        scope = scope_of(tenant, model, body, guard_of(text))
        vector = await self._embed(text, deadline)
        return Question(scope, vector, collection_of(self._model, len(vector)))

    async def nearest(self, tenant: str, question: Question) -> list[Match]:
        """Stored questions over the threshold, the most similar first; raises ``StoreError``."""
        found = await self._store.search(
            question.collection,
            question.vector,
            equal_to({"tenant": tenant, "scope": question.scope}),
            self._threshold,
            CANDIDATES,
        )
        return [match for point in found if (match := self._match(point, tenant, question)) is not None]

    def _match(self, point: Found, tenant: str, question: Question) -> Match | None:
        """The match in a point that the store found; None where its payload is not what was asked for."""
        payload = point.payload
        digest = payload.get("key")
        if (payload.get("tenant"), payload.get("scope")) != (tenant, question.scope):
            return None
        if not isinstance(digest, str) or not self._threshold <= point.score <= 1 + 1e-3:
            return None
        return Match(CacheKey(digest, tenant), min(1.0, point.score), point.id, question.collection)

    async def _embed(self, text: str, deadline: Deadline) -> Sequence[float]:
        if self._breaker.rejects:
            raise StoreError("embeddings_circuit_open")
        timeout_s = min(self._timeout_s, deadline.left_s * MAX_DEADLINE_SHARE)
        body = {"model": self._model, "input": text, "encoding_format": "float"}
        request = LlmRequest("embeddings", self._model, body, to_json(body), verbatim=True)
        try:
            with self._breaker.attempt():
                reply = await self._llm.ask(request, Deadline.after(timeout_s))
                vector = vector_of(reply.content)
                if vector is None:
                    raise UpstreamError(label="no vector")
                return vector
        except ServiceError:
            raise StoreError("embedding_failed") from None


def question_point(entry: Entry, question: Question) -> Point:
    """A question as it is stored: its vector and the key of its answer, and no text."""
    payload = {
        "key": entry.key.digest,
        "tenant": entry.key.tenant,
        "scope": question.scope,
        "model": entry.model,
        "created": entry.created_at,
        "expires": entry.expires_at,
    }
    return Point(entry.key.point_id, payload, question.vector)


def vector_of(content: bytes) -> list[float] | None:
    """The vector in an answer of ``/embeddings``; None where there is none that can be compared."""
    try:
        vector = json.loads(content)["data"][0]["embedding"]
        numbers = [float(number) for number in vector]
    except (ValueError, KeyError, TypeError, IndexError, OverflowError):
        return None
    if not 0 < len(numbers) <= MAX_DIMENSION or not all(map(math.isfinite, numbers)):
        return None
    return numbers if any(numbers) else None


def collection_of(model: str, dimension: int) -> str:
    """The collection of one model's vectors of one dimension: others cannot be compared with them."""
    return f"{COLLECTION}_{hashlib.sha256(model.encode()).hexdigest()[:12]}_{dimension}"


def last_question(body: Mapping[str, Any]) -> str | None:
    """The text of the last message, if it is the user's and has nothing but text."""
    messages = body.get("messages")
    last = messages[-1] if isinstance(messages, list) and messages else None
    if not isinstance(last, dict) or last.get("role") != "user" or not set(last) <= {"role", "content"}:
        return None
    content = last.get("content")
    if isinstance(content, list):
        if not all(isinstance(part, dict) and set(part) == {"type", "text"} for part in content):
            return None
        content = "\n".join(str(part["text"]) for part in content)
    if not isinstance(content, str) or not content.strip() or len(content) > MAX_QUESTION_CHARS:
        return None
    return content
