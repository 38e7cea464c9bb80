"""Questions that mean the same: their vectors, and what must be equal beside their likeness."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from service.clients.llm import LlmClient
from service.clients.llm_request import LlmRequest, to_json
from service.clients.vectors import COLLECTION, StoreError
from service.clients.vectors_points import Found, Point
from service.config.settings import Settings
from service.errors import ServiceError, UpstreamError
from service.services.cache_entry import Entry
from service.services.cache_guard import guard_of
from service.services.cache_key import CacheKey, scope_of
from service.services.cache_store import CacheStore
from service.services.circuit_breaker import CircuitBreaker
from service.utils.deadline import Deadline

MAX_QUESTION_CHARS = 2_000
"""A longer text is more than one question, and a model of 256 or 512 tokens sees its beginning only."""

SHARE_OF_DEADLINE = 0.1
MAX_DIMENSION = 16_384
CANDIDATES = 3


@dataclass(frozen=True, slots=True)
class Question:
    """A question that can be compared.

    Args:
        text: The last message.
        scope: What else must be equal; 64 hex digits.
        vector: Its meaning.
        collection: Where the vectors of this model are kept.
    """

    text: str
    scope: str
    vector: Sequence[float]
    collection: str


@dataclass(frozen=True, slots=True)
class Near:
    """A stored question that counts as the same."""

    key: CacheKey
    similarity: float
    point_id: str
    collection: str


class SemanticIndex:
    """Finds stored questions by their meaning.

    Args:
        llm: Makes the vectors.
        store: Keeps them.
        settings: The embedding model, the threshold, the limits.
        breaker: Keeps an embedding model that fails from being asked.
    """

    def __init__(
        self, llm: LlmClient, store: CacheStore, settings: Settings, breaker: CircuitBreaker
    ) -> None:
        self._llm = llm
        self._store = store
        self._model = settings.embedding_model
        self._threshold = settings.cache_similarity
        self._limit_s = settings.cache_embedding_timeout_s
        self._breaker = breaker

    async def question(
        self, tenant: str, model: str, body: Mapping[str, Any], deadline: Deadline
    ) -> Question | None:
        """The question in a request; None where it has none that could be compared.

        Raises:
            StoreError: Its vector could not be had in time.
        """
        text = last_question(body)
        if text is None:
            return None
        scope = scope_of(tenant, model, body, guard_of(text))
        vector = await self._embed(text, deadline)
        return Question(text, scope, vector, collection_of(self._model, len(vector)))

    async def nearest(self, tenant: str, question: Question) -> list[Near]:
        """Stored questions over the threshold, the likest first; raises ``StoreError``."""
        found = await self._store.search(
            question.collection,
            question.vector,
            {"tenant": tenant, "scope": question.scope},
            self._threshold,
            CANDIDATES,
        )
        return [near for point in found if (near := self._near(point, tenant, question)) is not None]

    def _near(self, point: Found, tenant: str, question: Question) -> Near | None:
        """What the store found, believed only where it says itself what was asked for."""
        payload = point.payload
        digest = payload.get("key")
        if (payload.get("tenant"), payload.get("scope")) != (tenant, question.scope):
            return None
        if not isinstance(digest, str) or not self._threshold <= point.score <= 1 + 1e-3:
            return None
        return Near(CacheKey(digest, tenant), min(1.0, point.score), point.id, question.collection)

    def point(self, entry: Entry, question: Question) -> Point:
        """What is stored for a question: where its answer is, and not a word of it."""
        payload = {
            "key": entry.key.digest,
            "tenant": entry.key.tenant,
            "scope": question.scope,
            "model": entry.model,
            "created": entry.created_at,
            "expires": entry.expires_at,
        }
        return Point(entry.key.point_id, payload, question.vector)

    async def _embed(self, text: str, deadline: Deadline) -> Sequence[float]:
        if self._breaker.rejects:
            raise StoreError("embeddings_circuit_open")
        limit_s = min(self._limit_s, deadline.left_s * SHARE_OF_DEADLINE)
        body = {"model": self._model, "input": text, "encoding_format": "float"}
        request = LlmRequest("embeddings", self._model, body, to_json(body), verbatim=True)
        try:
            with self._breaker.attempt():
                reply = await self._llm.ask(request, Deadline.after(limit_s))
                vector = vector_of(reply.content)
                if vector is None:
                    raise UpstreamError(label="no vector")
                return vector
        except ServiceError:
            raise StoreError("embedding_failed") from None


def vector_of(content: bytes) -> list[float] | None:
    """The vector in an embeddings answer; None where there is none that could be compared."""
    try:
        vector = json.loads(content)["data"][0]["embedding"]
        numbers = [float(number) for number in vector]
    except (ValueError, KeyError, TypeError, IndexError, OverflowError):
        return None
    if not 0 < len(numbers) <= MAX_DIMENSION or not all(map(math.isfinite, numbers)):
        return None
    return numbers if any(numbers) else None


def collection_of(model: str, dimension: int) -> str:
    """The collection for the vectors of one model and length: those of two are never compared."""
    return f"{COLLECTION}_{hashlib.sha256(model.encode()).hexdigest()[:12]}_{dimension}"


def last_question(body: Mapping[str, Any]) -> str | None:
    """The text of the last message, where the user said it, and in words only."""
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
