"""The vector store as the cache uses it: in time, behind a breaker, seen in the trace, and healed."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar
from urllib.parse import urlsplit

import httpx
from opentelemetry.semconv._incubating.attributes import db_attributes as db
from opentelemetry.semconv.attributes.error_attributes import ERROR_TYPE
from opentelemetry.semconv.attributes.server_attributes import SERVER_ADDRESS, SERVER_PORT
from opentelemetry.trace import SpanKind, Status, StatusCode, Tracer
from qdrant_client import AsyncQdrantClient, models
from qdrant_client.http.exceptions import ApiException, UnexpectedResponse

from service.cache.embedded import (
    LATER,
    URGENT,
    BusyStoreError,
    ClosedStoreError,
    EmbeddedStore,
    Work,
)
from service.config.settings import Settings
from service.errors import ServiceError, UpstreamError
from service.telemetry import names
from service.telemetry.events import emit

KEYWORD = models.KeywordIndexType.KEYWORD
INDEXES: Final = {
    "tenant": models.KeywordIndexParams(type=KEYWORD, is_tenant=True),
    "scope": models.PayloadSchemaType.KEYWORD,
    "model": models.PayloadSchemaType.KEYWORD,
    "expires": models.PayloadSchemaType.FLOAT,
    "created": models.PayloadSchemaType.FLOAT,
}


@dataclass(frozen=True, slots=True)
class Point:
    """A point: its id (a UUID), what it carries, its vector where its collection has any."""

    id: str
    payload: Mapping[str, Any]
    vector: Sequence[float] | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """A point that was found, and how like it is (cosine, 1 for the same)."""

    id: str
    payload: Mapping[str, Any]
    score: float


def index(collection: str, name: str, schema: object) -> Work:
    """Make an index over a field of the payload."""
    return lambda client: client.create_payload_index(collection, name, field_schema=schema)


def _vector(point: Point) -> dict[str, Any] | list[float]:
    return {} if point.vector is None else list(point.vector)


def filter_of(equal: Mapping[str, str]) -> models.Filter:
    """Lets through what says exactly this."""
    return models.Filter(
        must=[
            models.FieldCondition(key=name, match=models.MatchValue(value=value))
            for name, value in equal.items()
        ]
    )


def structs(points: Sequence[Point]) -> list[models.PointStruct]:
    """The points as the client takes them."""
    return [models.PointStruct(id=p.id, payload=dict(p.payload), vector=_vector(p)) for p in points]


def upsert(collection: str, points: list[models.PointStruct]) -> Work:
    """Write points, and wait until they are written."""
    return lambda client: client.upsert(collection, points=points, wait=True)


COLLECTION = "llmops_cache"
DELETE_CHUNK = 500
WRITE_CHUNK = 16
"""Points that the embedded store writes before it looks whether something urgent waits."""

NOT_FOUND = 404


class Breaker(Protocol):
    """A circuit breaker, as the cache uses it."""

    @property
    def rejects(self) -> bool:
        """Whether an attempt would be rejected now."""
        ...

    def attempt(self) -> AbstractContextManager[None]:
        """Let one attempt pass, and learn from how it ends."""
        ...


class StoreError(Exception):
    """The store did not do it; ``reason`` is one of a few words, fit for a metric or an event."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class NoCollectionError(StoreError):
    """The collection is not there, or not any more."""

    def __init__(self) -> None:
        super().__init__("no_collection")


def server_client(settings: Settings) -> AsyncQdrantClient:
    """The client of a Qdrant server."""
    return AsyncQdrantClient(
        url=settings.qdrant_url,
        api_key=settings.qdrant_api_key.get_secret_value() or None,
        timeout=settings.qdrant_timeout_s,
        check_compatibility=False,
        # Without these, a server on this machine gets a new connection for each request.
        limits=httpx.Limits(max_connections=settings.max_in_flight),
        trust_env=False,
    )


class VectorStore:
    """The store, which may be down; made by ``open_store``. Every method raises ``StoreError``."""

    def __init__(
        self,
        *,
        server: AsyncQdrantClient | None = None,
        embedded: EmbeddedStore | None = None,
        url: str = "",
    ) -> None:
        self._server = server
        self._embedded = embedded
        address = urlsplit(url)
        self.address = address.hostname
        self.port = address.port

    @property
    def is_server(self) -> bool:
        """Whether other processes may use the same store."""
        return self._server is not None

    async def ping(self) -> None:
        """Ask for the collection, which reaches the storage; raises ``UpstreamError`` when it is down."""
        try:
            if self._embedded is not None:
                await self._embedded.open()
            await self._call(lambda client: client.collection_exists(COLLECTION))
        except asyncio.CancelledError:
            raise
        except StoreError as error:
            raise UpstreamError(label=f"the store: {error.reason}") from None
        except Exception as error:  # noqa: BLE001 - a lock, a disk, a format: it is down whatever it was
            raise UpstreamError(label=f"the store could not be opened: {type(error).__name__}") from None

    async def ensure(self, collection: str, dimension: int | None) -> None:
        """Make the collection unless it is there as it should be; without a dimension it has no vectors."""
        if await self._call(lambda client: client.collection_exists(collection)):
            if await self._dimension(collection) == dimension:
                return
            # Its name says what its vectors are: somebody else has made this one.
            await self.drop(collection)
        vectors: Any = {}
        if dimension is not None:
            vectors = models.VectorParams(size=dimension, distance=models.Distance.COSINE)
        try:
            await self._call(lambda client: client.create_collection(collection, vectors_config=vectors))
        except StoreError:
            # Another process may have been quicker.
            if not await self._call(lambda client: client.collection_exists(collection)):
                raise
        if self._server is None:
            return
        for name, schema in INDEXES.items():
            await self._call(index(collection, name, schema))

    async def _dimension(self, collection: str) -> int | None:
        info = await self._call(lambda client: client.get_collection(collection))
        return getattr(info.config.params.vectors, "size", None)

    async def read(self, collection: str, point_id: str) -> Mapping[str, Any] | None:
        """What the point with this id carries; None when there is none."""
        found = await self._call(
            lambda client: client.retrieve(collection, ids=[point_id], with_payload=True, with_vectors=False)
        )
        return (found[0].payload or {}) if found else None

    async def search(
        self, collection: str, vector: Sequence[float], equal: Mapping[str, str], threshold: float, limit: int
    ) -> list[Found]:
        """The points most like the vector, best first, among those whose payload says exactly this."""
        answer = await self._call(
            lambda client: client.query_points(
                collection,
                query=list(vector),
                query_filter=filter_of(equal),
                score_threshold=threshold,
                limit=limit,
                with_payload=True,
            )
        )
        return [Found(str(point.id), point.payload or {}, float(point.score)) for point in answer.points]

    async def write(self, collection: str, points: Sequence[Point]) -> None:
        """Write the points; one that is there already is replaced."""
        made = structs(points)
        size = WRITE_CHUNK if self._server is None else len(made)
        for start in range(0, len(made), size):
            chunk = made[start : start + size]
            await self._call(upsert(collection, chunk), urgency=LATER)

    async def count(self, collection: str, equal: Mapping[str, str] | None = None) -> int:
        """How many points there are, or how many whose payload says exactly this."""
        wanted = filter_of(equal) if equal else None
        found = await self._call(lambda client: client.count(collection, count_filter=wanted, exact=True))
        return int(found.count)

    async def delete(self, collection: str, ids: Sequence[str]) -> None:
        """Delete points by their ids; those that are not there are passed over."""
        for start in range(0, len(ids), DELETE_CHUNK):
            chunk = list(ids[start : start + DELETE_CHUNK])
            await self._call(self._deletion(collection, chunk), urgency=LATER)

    def _deletion(self, collection: str, ids: list[str]) -> Work:
        embedded = self._embedded

        def delete(client: Any) -> object:  # noqa: ANN401 - either client, by what they have in common
            if embedded is not None:
                # The embedded client hides a deleted point and keeps what it carried, for ever.
                with suppress(ValueError, KeyError):
                    client.overwrite_payload(collection, payload={}, points=ids)
                embedded.deleted += len(ids)
            return client.delete(collection, points_selector=models.PointIdsList(points=list(ids)))

        return delete

    async def expired(self, collection: str, now: float, limit: int) -> list[str]:
        """Ids of points that are not good any more."""
        over = models.Filter(must=[models.FieldCondition(key="expires", range=models.Range(lte=now))])
        return await self._ids(collection, limit, scroll_filter=over)

    async def oldest(self, collection: str, limit: int) -> list[str]:
        """Ids of the points that were written first."""
        return await self._ids(collection, limit, order_by=models.OrderBy(key="created"))

    async def having(self, collection: str, equal: Mapping[str, str], limit: int) -> list[str]:
        """Ids of points whose payload says exactly this."""
        return await self._ids(collection, limit, scroll_filter=filter_of(equal))

    async def _ids(self, collection: str, limit: int, **which: object) -> list[str]:
        found, _next = await self._call(
            lambda client: client.scroll(collection, limit=limit, with_payload=False, **which), urgency=LATER
        )
        return [str(point.id) for point in found]

    async def collections(self) -> list[str]:
        """The names of the cache's collections."""
        answer = await self._call(lambda client: client.get_collections())
        return [entry.name for entry in answer.collections if entry.name.startswith(COLLECTION)]

    async def drop(self, collection: str) -> None:
        """Delete the collection, with everything in it."""
        await self._call(lambda client: client.delete_collection(collection))

    async def _call(self, work: Work, *, urgency: int = URGENT) -> Any:  # noqa: ANN401 - what the client gives
        """Let the client do it, here or in its thread; what it raises comes out as one of few reasons."""
        try:
            if self._embedded is not None:
                return await self._embedded.run(work, urgency=urgency)
            return await work(self._server)
        except UnexpectedResponse as error:
            if error.status_code == NOT_FOUND:
                raise NoCollectionError from None
            raise StoreError(f"status_{error.status_code}") from None
        except ApiException as error:
            raise StoreError(_transport_reason(error)) from None
        except ClosedStoreError:
            raise StoreError("not_open") from None
        except BusyStoreError:
            raise StoreError("busy") from None
        except Exception as error:  # noqa: BLE001 - the embedded client raises whatever it meets
            # The embedded client has one kind of error for a collection that is not there, and for the rest.
            if isinstance(error, ValueError) and "not found" in str(error):
                raise NoCollectionError from None
            raise StoreError("nonsense" if self._embedded is None else type(error).__name__) from None


def _transport_reason(error: ApiException) -> str:
    cause = getattr(error, "source", None)
    if isinstance(cause, httpx.TimeoutException):
        return "timeout"
    if isinstance(cause, httpx.ConnectError):
        return "unreachable"
    return "broken_off" if isinstance(cause, httpx.HTTPError) else "nonsense"


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
        vectors: VectorStore,
        breaker: Callable[[str], Breaker],
        tracer: Tracer,
        limit_s: float,
        *,
        on_failing: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.vectors = vectors
        self.shared = vectors.is_server
        self._breaker = breaker("qdrant")
        self._search_breaker = breaker("qdrant_search")
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
                "retrieve", collection, self.vectors.read(collection, point_id), self._limit_s
            )
        except NoCollectionError:
            self._lost(collection)
            return None

    async def search(
        self, collection: str, vector: Sequence[float], equal: Mapping[str, str], threshold: float, limit: int
    ) -> list[Found]:
        """The points most like the vector among those that say this; none where there is no collection."""
        work = self.vectors.search(collection, vector, equal, threshold, limit)
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
                await self._do("upsert", collection, self.vectors.write(collection, points), WRITE_LIMIT_S)
            except NoCollectionError:
                self._lost(collection)
                if attempt == 2:  # noqa: PLR2004 - the last one
                    raise
            else:
                return

    async def prepare(self, collection: str, dimension: int | None = None) -> None:
        """Make the collection, unless it is there."""
        if collection not in self._ready:
            making = self.vectors.ensure(collection, dimension)
            await self._do("create_collection", collection, making, WRITE_LIMIT_S)
            self._ready.add(collection)

    async def delete(self, collection: str, ids: Sequence[str]) -> None:
        """Delete points, if they are there."""
        with suppress(NoCollectionError):
            await self._do("delete", collection, self.vectors.delete(collection, ids), WRITE_LIMIT_S)

    async def count(self, collection: str, equal: Mapping[str, str] | None = None) -> int:
        """How many points say this; all of them where nothing is said."""
        try:
            return await self._do("count", collection, self.vectors.count(collection, equal), self._limit_s)
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
        return await self._do("list_collections", COLLECTION, self.vectors.collections(), WRITE_LIMIT_S)

    async def drop(self, collection: str) -> None:
        """Delete a collection; the next write makes it again."""
        self._ready.discard(collection)
        with suppress(NoCollectionError):
            await self._do("delete_collection", collection, self.vectors.drop(collection), WRITE_LIMIT_S)

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
        breaker: Breaker | None = None,
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

    async def _attempt(self, work: Awaitable[T], limit_s: float, breaker: Breaker) -> T:
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
