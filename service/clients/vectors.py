"""The vector store: points by id, by likeness and by filter; the same for a server and for embedded files."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

import httpx
from qdrant_client import AsyncQdrantClient, models
from qdrant_client.http.exceptions import ApiException, UnexpectedResponse

from service.clients.vectors_embedded import (
    LATER,
    URGENT,
    BusyStoreError,
    ClosedStoreError,
    EmbeddedStore,
    Work,
)
from service.clients.vectors_points import INDEXES, Found, Point, filter_of, index, structs, upsert
from service.config.settings import Settings
from service.errors import UpstreamError

COLLECTION = "llmops_cache"
OPEN_LIMIT_S = 10.0
"""So long the start of the process waits for an embedded store to be read."""

DELETE_CHUNK = 500
WRITE_CHUNK = 16
"""Points that the embedded store writes before it looks whether something urgent waits."""

NOT_FOUND = 404


class StoreError(Exception):
    """The store did not do it; ``reason`` is one of a few words, fit for a metric or an event."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class NoCollectionError(StoreError):
    """The collection is not there, or not any more."""

    def __init__(self) -> None:
        super().__init__("no_collection")


@asynccontextmanager
async def open_vectors(settings: Settings) -> AsyncIterator["Vectors"]:
    """Open the store: a server's client, or the embedded one.

    A folder that cannot be opened makes a store that is down, not a service that does not start: the cache is
    worth nothing without it, and everything else works. It is tried again with each ping.
    """
    if settings.qdrant_url:
        client = _server(settings)
        try:
            yield Vectors(server=client, url=settings.qdrant_url)
        finally:
            await client.close()
        return
    embedded = EmbeddedStore(settings.qdrant_path)
    with suppress(Exception):  # said by the store itself
        async with asyncio.timeout(OPEN_LIMIT_S):
            await embedded.open()
    try:
        yield Vectors(embedded=embedded)
    finally:
        await embedded.close()


def _server(settings: Settings) -> AsyncQdrantClient:
    return AsyncQdrantClient(
        url=settings.qdrant_url,
        api_key=settings.qdrant_api_key.get_secret_value() or None,
        timeout=settings.qdrant_timeout_s,
        check_compatibility=False,
        # Without these, a server on this machine gets a new connection for each request.
        limits=httpx.Limits(max_connections=settings.max_in_flight),
        trust_env=False,
    )


class Vectors:
    """The store, which may be down; made by ``open_vectors``. Every method raises ``StoreError``."""

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
