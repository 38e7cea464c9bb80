"""The vector store: its interface, and the guard around every store.

``VectorStore`` has two implementations: ``QdrantServer`` and ``EmbeddedStore``. The cache uses them
through ``GuardedStore`` only, which adds the time limit, the circuit breaker and the CLIENT span, and creates
collections that are missing.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final, Protocol

from opentelemetry.semconv._incubating.attributes import db_attributes as db
from opentelemetry.semconv.attributes.error_attributes import ERROR_TYPE
from opentelemetry.trace import SpanKind, Status, StatusCode, Tracer
from qdrant_client.http import models

from service.errors import ServiceError, UpstreamError
from service.telemetry import names
from service.telemetry.events import emit

COLLECTION = "llmops_cache"
"""The answers' collection; the collections of questions' vectors have names that begin with it."""

KEYWORD = models.KeywordIndexType.KEYWORD
INDEXES: Final[Mapping[str, models.KeywordIndexParams | models.PayloadSchemaType]] = {
    "tenant": models.KeywordIndexParams(type=KEYWORD, is_tenant=True),
    "scope": models.PayloadSchemaType.KEYWORD,
    "model": models.PayloadSchemaType.KEYWORD,
    "expires": models.PayloadSchemaType.FLOAT,
    "created": models.PayloadSchemaType.FLOAT,
}
"""Indexes over fields of the payload, which a server needs for filters and for ordering."""

OLDEST_FIRST: Final = models.OrderBy(key="created")

logger = logging.getLogger(__name__)


class StoreError(Exception):
    """The store failed; ``reason`` is one of a few words, fit for an event's attribute."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class NoCollectionError(StoreError):
    """The collection does not exist, or does not exist any more."""

    def __init__(self) -> None:
        super().__init__("no_collection")


@dataclass(frozen=True, slots=True)
class Point:
    """A point to be written: its id (a UUID), its payload, and a vector if the collection has any."""

    id: str
    payload: Mapping[str, Any]
    vector: Sequence[float] | None = None

    def as_struct(self) -> models.PointStruct:
        """The point as Qdrant's clients take it."""
        vector: Any = {} if self.vector is None else list(self.vector)
        return models.PointStruct(id=self.id, payload=dict(self.payload), vector=vector)


@dataclass(frozen=True, slots=True)
class Found:
    """A point that a search found, and its similarity to the vector (cosine, 1 for the same direction)."""

    id: str
    payload: Mapping[str, Any]
    score: float


def equal_to(values: Mapping[str, str]) -> models.Filter:
    """A filter for points whose payload has these values."""
    return models.Filter(
        must=[
            models.FieldCondition(key=name, match=models.MatchValue(value=value))
            for name, value in values.items()
        ]
    )


def expired_at(now: float) -> models.Filter:
    """A filter for points that have expired; the time is Unix time in seconds."""
    return models.Filter(must=[models.FieldCondition(key="expires", range=models.Range(lte=now))])


def vectors_config(dimension: int | None) -> Any:  # noqa: ANN401 - either of two types of Qdrant's
    """The configuration of a collection with vectors of this dimension, or without vectors."""
    if dimension is None:
        return {}
    return models.VectorParams(size=dimension, distance=models.Distance.COSINE)


def dimension_of(collection: models.CollectionInfo) -> int | None:
    """The dimension of a collection's vectors; None where it has no vectors, or several."""
    vectors = collection.config.params.vectors
    return vectors.size if isinstance(vectors, models.VectorParams) else None


class VectorStore(Protocol):
    """A store of points with payloads and vectors, which may be down.

    Every method but ``ping`` raises whatever its client raises; ``translate`` names it.
    """

    shared: bool
    """Whether other processes may use the same store."""

    attributes: Mapping[str, str | int]
    """Attributes of each span of a call: the server's address."""

    def translate(self, error: Exception) -> StoreError:
        """The ``StoreError`` for what a method raised."""
        ...

    async def ping(self) -> None:
        """Check that the storage can be reached; raises ``UpstreamError`` when it cannot."""
        ...

    async def ensure(self, collection: str, dimension: int | None) -> None:
        """Create the collection, or replace it where its vectors have another dimension."""
        ...

    async def read(self, collection: str, point_id: str) -> Mapping[str, Any] | None:
        """The payload of the point with this id; None when there is none."""
        ...

    async def search(
        self, collection: str, vector: Sequence[float], which: models.Filter, threshold: float, limit: int
    ) -> list[Found]:
        """The points most similar to the vector, best first, among those that pass the filter."""
        ...

    async def write(self, collection: str, points: Sequence[Point]) -> None:
        """Write points; a point with the same id is replaced."""
        ...

    async def count(self, collection: str, which: models.Filter | None = None) -> int:
        """The number of points, or of those that pass the filter."""
        ...

    async def delete(self, collection: str, ids: Sequence[str]) -> None:
        """Delete points by their ids; ids that do not exist are ignored."""
        ...

    async def ids(
        self,
        collection: str,
        limit: int,
        which: models.Filter | None = None,
        order_by: models.OrderBy | None = None,
    ) -> list[str]:
        """Ids of the points that pass the filter, in this order."""
        ...

    async def collections(self) -> list[str]:
        """The names of all collections."""
        ...

    async def drop(self, collection: str) -> None:
        """Delete the collection with everything in it."""
        ...


class Breaker(Protocol):
    """A circuit breaker, as the cache uses it."""

    @property
    def rejects(self) -> bool:
        """Whether an attempt would be rejected now."""
        ...

    def attempt(self) -> AbstractContextManager[None]:
        """Let one attempt pass, and learn from how it ends."""
        ...


SYSTEM = "qdrant"
WRITE_TIMEOUT_S = 10.0
"""Time limit of calls that no request waits for."""

DAMAGED_LOG_INTERVAL_S = 60.0
CIRCUIT_OPEN = "circuit_open"
SLOW = "slow"


@dataclass(frozen=True, slots=True)
class Guard:
    """What happens when a store fails.

    Args:
        breaker: Makes a circuit breaker of this name.
        on_failing: Called when the store fails after it had worked.
    """

    breaker: Callable[[str], Breaker]
    on_failing: Callable[[], None] = lambda: None


class GuardedStore:
    """The store as the cache uses it: every call is limited in time and ends well or with ``StoreError``.

    Args:
        store: The vector store.
        guard: What happens when it fails. Searches have a breaker of their own: in a large collection they
            can be too slow while reads are fast.
        tracer: For the CLIENT spans.
        timeout_s: Time limit of calls that a request waits for.
    """

    def __init__(self, store: VectorStore, guard: Guard, tracer: Tracer, timeout_s: float) -> None:
        self.shared = store.shared
        self._store = store
        self._breaker = guard.breaker("qdrant")
        self._search_breaker = guard.breaker("qdrant_search")
        self._tracer = tracer
        self._timeout_s = timeout_s
        self._on_failing = guard.on_failing
        self._ready: set[str] = set()
        """Collections that this process has seen or created."""
        self._failures = 0
        self._damaged = 0
        self._damaged_logged_at = float("-inf")

    async def read(self, collection: str, point_id: str) -> Mapping[str, Any] | None:
        """The payload of a point; None where the point or the collection does not exist."""
        try:
            async with self._guard("retrieve", collection, self._timeout_s):
                return await self._store.read(collection, point_id)
        except NoCollectionError:
            self._note_missing(collection)
            return None

    async def search(
        self, collection: str, vector: Sequence[float], which: models.Filter, threshold: float, limit: int
    ) -> list[Found]:
        """The points most similar to the vector that pass the filter; none without the collection."""
        try:
            async with self._guard("query", collection, self._timeout_s, self._search_breaker):
                return await self._store.search(collection, vector, which, threshold, limit)
        except NoCollectionError:
            self._note_missing(collection)
            return []

    async def write(self, collection: str, points: Sequence[Point]) -> None:
        """Write points; a collection that does not exist, or has vanished, is created."""
        vector = points[0].vector
        for attempt in (1, 2):
            await self.prepare(collection, None if vector is None else len(vector))
            try:
                async with self._guard("upsert", collection, WRITE_TIMEOUT_S):
                    await self._store.write(collection, points)
            except NoCollectionError:
                self._note_missing(collection)
                if attempt == 2:  # noqa: PLR2004 - the last one
                    raise
            else:
                return

    async def prepare(self, collection: str, dimension: int | None = None) -> None:
        """Create the collection, unless this process knows that it exists."""
        if collection not in self._ready:
            async with self._guard("create_collection", collection, WRITE_TIMEOUT_S):
                await self._store.ensure(collection, dimension)
            self._ready.add(collection)

    async def delete(self, collection: str, ids: Sequence[str]) -> None:
        """Delete points, if they exist."""
        with suppress(NoCollectionError):
            async with self._guard("delete", collection, WRITE_TIMEOUT_S):
                await self._store.delete(collection, ids)

    async def count(self, collection: str) -> int:
        """The number of points; 0 without the collection."""
        try:
            async with self._guard("count", collection, self._timeout_s):
                return await self._store.count(collection)
        except NoCollectionError:
            return 0

    async def ids(
        self,
        collection: str,
        limit: int,
        which: models.Filter | None = None,
        order_by: models.OrderBy | None = None,
    ) -> list[str]:
        """Ids of the points that pass the filter, in this order; none without the collection."""
        try:
            async with self._guard("scroll", collection, WRITE_TIMEOUT_S):
                return await self._store.ids(collection, limit, which, order_by)
        except NoCollectionError:
            return []

    async def collections(self) -> list[str]:
        """The names of the cache's collections."""
        async with self._guard("list_collections", COLLECTION, WRITE_TIMEOUT_S):
            found = await self._store.collections()
        return [name for name in found if name.startswith(COLLECTION)]

    async def drop(self, collection: str) -> None:
        """Delete a collection; the next write creates it again."""
        self._ready.discard(collection)
        with suppress(NoCollectionError):
            async with self._guard("delete_collection", collection, WRITE_TIMEOUT_S):
                await self._store.drop(collection)

    def note_damaged(self, reason: str) -> None:
        """Log, once a minute at most, that the store returned a payload that is no entry."""
        self._damaged += 1
        if time.monotonic() < self._damaged_logged_at + DAMAGED_LOG_INTERVAL_S:
            return
        self._damaged_logged_at = time.monotonic()
        emit(
            logger,
            names.EVENT_CACHE_ERROR,
            f"The cache holds a damaged entry: {reason}",
            {"reason": "damaged_entry", "failures": self._damaged},
            level=logging.WARNING,
        )

    @asynccontextmanager
    async def _guard(
        self, operation: str, collection: str, timeout_s: float, breaker: Breaker | None = None
    ) -> AsyncIterator[None]:
        """One call of the store, within its time limit, under its breaker and in its CLIENT span.

        Raises:
            NoCollectionError: The collection does not exist, which does not count as a failure.
            StoreError: The store failed, or was not called because the breaker is open.
        """
        breaker = breaker or self._breaker
        if breaker.rejects:
            raise StoreError(CIRCUIT_OPEN)
        failure: StoreError | None = None
        with self._tracer.start_as_current_span(
            f"{operation} {collection}",
            kind=SpanKind.CLIENT,
            attributes={
                db.DB_SYSTEM_NAME: SYSTEM,
                db.DB_OPERATION_NAME: operation,
                db.DB_COLLECTION_NAME: collection,
                **self._store.attributes,
            },
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            try:
                with breaker.attempt():
                    try:
                        async with asyncio.timeout(timeout_s):
                            yield
                    except TimeoutError:
                        failure = StoreError(SLOW)
                    except Exception as error:  # noqa: BLE001 - the clients raise whatever they meet
                        failure = self._store.translate(error)
                    if failure is not None and not isinstance(failure, NoCollectionError):
                        # The breaker counts this service's errors only.
                        raise UpstreamError(label=failure.reason) from None
            except ServiceError:
                failure = failure or StoreError(CIRCUIT_OPEN)
            if isinstance(failure, NoCollectionError):
                if collection in self._ready:
                    span.set_attribute(ERROR_TYPE, failure.reason)
                raise failure from None
            if failure is not None:
                span.set_attribute(ERROR_TYPE, failure.reason)
                span.set_status(Status(StatusCode.ERROR))
                self._note_failure(operation, failure.reason)
                raise failure from None
        if self._failures:
            logger.info("The cache works again", extra={"failures": self._failures})
            self._failures = 0
            # A store that was down may come back empty.
            self._ready.clear()

    def _note_missing(self, collection: str) -> None:
        """Log that a collection has vanished, if this process has seen it before."""
        if collection in self._ready:
            self._ready.discard(collection)
            emit(
                logger,
                names.EVENT_CACHE_ERROR,
                "The cache's collection has vanished; it is created again",
                {"reason": "no_collection", "failures": 1},
                level=logging.WARNING,
            )

    def _note_failure(self, operation: str, reason: str) -> None:
        self._failures += 1
        if self._failures > 1:
            return
        emit(
            logger,
            names.EVENT_CACHE_ERROR,
            f"The cache fails: {reason}",
            {"reason": reason, "operation": operation, "failures": self._failures},
            level=logging.WARNING,
        )
        self._on_failing()
