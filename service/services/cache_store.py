"""The vector store as the cache uses it: in time, behind a breaker, seen in the trace, and healed."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from opentelemetry.semconv._incubating.attributes import db_attributes as db
from opentelemetry.semconv.attributes.error_attributes import ERROR_TYPE
from opentelemetry.semconv.attributes.server_attributes import SERVER_ADDRESS, SERVER_PORT
from opentelemetry.trace import SpanKind, Status, StatusCode, Tracer

from service.clients.vectors import COLLECTION, NoCollectionError, StoreError, Vectors
from service.clients.vectors_points import Found, Point
from service.errors import ServiceError, UpstreamError
from service.services.circuit_breaker import CircuitBreaker
from service.telemetry import names
from service.telemetry.events import emit

SYSTEM = "qdrant"
WRITE_LIMIT_S = 10.0
"""Time limit of what nobody waits for."""

SAY_AGAIN_S = 60.0
OPEN = "circuit_open"
SLOW = "slow"

T = TypeVar("T")

logger = logging.getLogger(__name__)


class CacheStore:
    """Reads and writes points; what goes wrong comes out as ``StoreError``, within a limit.

    Args:
        vectors: The vector store.
        breaker: Keeps a store that fails from being asked.
        tracer: For the CLIENT spans.
        limit_s: Seconds that a read may take.
        search_breaker: The same for searches: among too many points they are slow while reads are not.
        on_failing: Called when the store has failed after it had worked.
        clock: Monotonic, in seconds.
    """

    def __init__(  # noqa: PLR0913 - ends, a limit and seams
        self,
        vectors: Vectors,
        breaker: CircuitBreaker,
        tracer: Tracer,
        limit_s: float,
        *,
        search_breaker: CircuitBreaker | None = None,
        on_failing: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._vectors = vectors
        self._breaker = breaker
        self._search_breaker = search_breaker or breaker
        self._tracer = tracer
        self._limit_s = limit_s
        self._on_failing = on_failing
        self._ready: set[str] = set()
        self._failing = ""
        self._failures = 0
        self._clock = clock
        self._damaged = 0
        self._damaged_said_at = float("-inf")
        self._server: dict[str, str | int] = {SERVER_ADDRESS: vectors.address} if vectors.address else {}
        if vectors.port:
            self._server[SERVER_PORT] = vectors.port

    async def read(self, collection: str, point_id: str) -> Mapping[str, Any] | None:
        """What a point carries; None where there is none, and where there is no collection yet."""
        try:
            return await self._do(
                "retrieve", collection, self._vectors.read(collection, point_id), self._limit_s
            )
        except NoCollectionError:
            self._lost(collection)
            return None

    async def search(
        self, collection: str, vector: Sequence[float], equal: Mapping[str, str], threshold: float, limit: int
    ) -> list[Found]:
        """The points most like the vector among those that say this; none where there is no collection."""
        work = self._vectors.search(collection, vector, equal, threshold, limit)
        try:
            return await self._do("query", collection, work, self._limit_s, self._search_breaker)
        except NoCollectionError:
            self._lost(collection)
            return []

    async def write(self, collection: str, points: Sequence[Point]) -> None:
        """Write points; a collection that is not there is made, and one that has vanished is made again."""
        vector = points[0].vector
        for attempt in (1, 2):
            await self.prepare(collection, None if vector is None else len(vector))
            try:
                await self._do("upsert", collection, self._vectors.write(collection, points), WRITE_LIMIT_S)
            except NoCollectionError:
                self._lost(collection)
                if attempt == 2:  # noqa: PLR2004 - the last one
                    raise
            else:
                return

    async def prepare(self, collection: str, dimension: int | None = None) -> None:
        """Make the collection, unless it is there."""
        if collection not in self._ready:
            making = self._vectors.ensure(collection, dimension)
            await self._do("create_collection", collection, making, WRITE_LIMIT_S)
            self._ready.add(collection)

    async def delete(self, collection: str, ids: Sequence[str]) -> None:
        """Delete points, if they are there."""
        with suppress(NoCollectionError):
            await self._do("delete", collection, self._vectors.delete(collection, ids), WRITE_LIMIT_S)

    async def count(self, collection: str, equal: Mapping[str, str] | None = None) -> int:
        """How many points say this; all of them where nothing is said."""
        try:
            return await self._do("count", collection, self._vectors.count(collection, equal), self._limit_s)
        except NoCollectionError:
            return 0

    async def ids(self, collection: str, work: Awaitable[list[str]]) -> list[str]:
        """What a question for ids finds; nothing where there is no collection."""
        try:
            return await self._do("scroll", collection, work, WRITE_LIMIT_S)
        except NoCollectionError:
            return []

    async def collections(self) -> list[str]:
        """The cache's collections as they are now."""
        return await self._do("list_collections", COLLECTION, self._vectors.collections(), WRITE_LIMIT_S)

    async def drop(self, collection: str) -> None:
        """Delete a collection; the next write makes it again."""
        self._ready.discard(collection)
        with suppress(NoCollectionError):
            await self._do("delete_collection", collection, self._vectors.drop(collection), WRITE_LIMIT_S)

    def damaged(self, reason: str) -> None:
        """Say, now and then, that the store holds what cannot be an entry; the store itself works."""
        self._damaged += 1
        if self._clock() < self._damaged_said_at + SAY_AGAIN_S:
            return
        self._damaged_said_at = self._clock()
        emit(
            logger,
            names.EVENT_CACHE_ERROR,
            f"The cache holds a damaged entry: {reason}",
            {"reason": "damaged_entry", "failures": self._damaged},
            level=logging.WARNING,
        )

    async def _do(
        self,
        operation: str,
        collection: str,
        work: Awaitable[T],
        limit_s: float,
        breaker: CircuitBreaker | None = None,
    ) -> T:
        """Await the work within the limit, under the breaker and a CLIENT span."""
        breaker = breaker or self._breaker
        if breaker.rejects:
            _never_awaited(work)
            raise StoreError(OPEN)
        with self._tracer.start_as_current_span(
            f"{operation} {collection}",
            kind=SpanKind.CLIENT,
            attributes={
                db.DB_SYSTEM_NAME: SYSTEM,
                db.DB_OPERATION_NAME: operation,
                db.DB_COLLECTION_NAME: collection,
                **self._server,
            },
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            try:
                result = await self._attempt(work, limit_s, breaker)
            except NoCollectionError:
                if collection in self._ready:
                    span.set_attribute(ERROR_TYPE, "no_collection")
                raise
            except StoreError as error:
                span.set_attribute(ERROR_TYPE, error.reason)
                span.set_status(Status(StatusCode.ERROR))
                self._failed(operation, error.reason)
                raise
        self._worked()
        return result

    async def _attempt(self, work: Awaitable[T], limit_s: float, breaker: CircuitBreaker) -> T:
        reason = SLOW
        try:
            with breaker.attempt():
                try:
                    async with asyncio.timeout(limit_s):
                        return await work
                except NoCollectionError:
                    # The store answers: that is no failure of it.
                    pass
                except TimeoutError:
                    raise UpstreamError(label=SLOW) from None
                except StoreError as error:
                    reason = error.reason
                    raise UpstreamError(label=reason) from None
        except ServiceError:
            raise StoreError(reason) from None
        raise NoCollectionError

    def _lost(self, collection: str) -> None:
        """Note that a collection is not there; news only where this process has seen it."""
        if collection in self._ready:
            self._ready.discard(collection)
            emit(
                logger,
                names.EVENT_CACHE_ERROR,
                "The cache's collection has vanished; it is made again",
                {"reason": "no_collection", "failures": 1},
                level=logging.WARNING,
            )

    def _failed(self, operation: str, reason: str) -> None:
        self._failures += 1
        if self._failing:
            return
        self._failing = reason
        emit(
            logger,
            names.EVENT_CACHE_ERROR,
            f"The cache fails: {reason}",
            {"reason": reason, "operation": operation, "failures": self._failures},
            level=logging.WARNING,
        )
        self._on_failing()

    def _worked(self) -> None:
        if self._failing:
            logger.info("The cache works again", extra={"failures": self._failures})
            # What was made before may be gone: a store that comes back may come back empty.
            self._ready.clear()
        self._failing = ""
        self._failures = 0


def _never_awaited(work: Awaitable[Any]) -> None:
    close = getattr(work, "close", None)
    if close is not None:
        close()
