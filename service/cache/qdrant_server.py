"""The store on a Qdrant server or cluster; only a process that is to use one imports this module."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

import httpx
from opentelemetry.semconv.attributes.server_attributes import SERVER_ADDRESS, SERVER_PORT
from qdrant_client import AsyncQdrantClient
from qdrant_client.http import models
from qdrant_client.http.exceptions import ApiException, ResponseHandlingException, UnexpectedResponse

from service.cache.store import (
    COLLECTION,
    INDEXES,
    Found,
    NoCollectionError,
    Point,
    StoreError,
    dimension_of,
    vectors_config,
)
from service.config.settings import Settings
from service.errors import UpstreamError

DELETE_CHUNK = 500


@asynccontextmanager
async def open_server(settings: Settings) -> AsyncIterator["QdrantServer"]:
    """Open the client of the Qdrant server; nothing is sent until it is used, and leaving closes it."""
    client = AsyncQdrantClient(
        url=settings.qdrant_url,
        api_key=settings.qdrant_api_key.get_secret_value() or None,
        timeout=settings.qdrant_timeout_s,
        check_compatibility=False,
        # Without limits given here, the client opens a new connection for each request to a local server.
        limits=httpx.Limits(max_connections=settings.max_in_flight),
        trust_env=False,
    )
    try:
        yield QdrantServer(client, settings)
    finally:
        await client.close()


class QdrantServer:
    """A ``VectorStore`` on a Qdrant server or cluster; made by ``open_server``.

    In a cluster a read asks one copy of a shard, and a write has succeeded when one copy has it: an old or a
    missing copy costs a cache nothing but a hit, and the failure of another node is not waited for.
    """

    shared = True

    def __init__(self, client: AsyncQdrantClient, settings: Settings) -> None:
        self._client = client
        # None leaves it to the server.
        self._shards = settings.qdrant_shard_number or None
        self._copies = settings.qdrant_replication_factor or None
        address = urlsplit(settings.qdrant_url)
        server = {SERVER_ADDRESS: address.hostname, SERVER_PORT: address.port}
        self.attributes: Mapping[str, str | int] = {name: value for name, value in server.items() if value}

    def translate(self, error: Exception) -> StoreError:
        """Name a status, or what went wrong on the wire."""
        match error:
            case UnexpectedResponse(status_code=HTTPStatus.NOT_FOUND):
                return NoCollectionError()
            case UnexpectedResponse():
                return StoreError(f"status_{error.status_code}")
            case ResponseHandlingException(source=httpx.TimeoutException()):
                return StoreError("timeout")
            case ResponseHandlingException(source=httpx.ConnectError()):
                return StoreError("unreachable")
            case ResponseHandlingException(source=httpx.HTTPError()):
                return StoreError("broken_off")
        return StoreError("nonsense")

    async def ping(self) -> None:
        """Ask for the collection, which reaches the server's storage."""
        try:
            await self._client.collection_exists(COLLECTION)
        except Exception as error:  # noqa: BLE001 - whatever the client raises, the store is down
            raise UpstreamError(label=f"the store: {self.translate(error).reason}") from None

    async def ensure(self, collection: str, dimension: int | None) -> None:
        """Create the collection and its indexes; another process may do the same at the same time."""
        if await self._client.collection_exists(collection):
            if dimension_of(await self._client.get_collection(collection)) == dimension:
                return
            # Its name states its dimension, so it is not one that this service has made.
            await self._client.delete_collection(collection)
        try:
            await self._client.create_collection(
                collection,
                vectors_config=vectors_config(dimension),
                shard_number=self._shards,
                replication_factor=self._copies,
                write_consistency_factor=1,
            )
        except ApiException:
            # Another process may have created it first.
            if not await self._client.collection_exists(collection):
                raise
        for name, schema in INDEXES.items():
            await self._client.create_payload_index(collection, name, field_schema=schema)

    async def read(self, collection: str, point_id: str) -> Mapping[str, Any] | None:
        """The payload of the point with this id; None when there is none."""
        records = await self._client.retrieve(
            collection, ids=[point_id], with_payload=True, with_vectors=False
        )
        return (records[0].payload or {}) if records else None

    async def search(
        self, collection: str, vector: Sequence[float], which: models.Filter, threshold: float, limit: int
    ) -> list[Found]:
        """The points most similar to the vector, best first, among those that pass the filter."""
        answer = await self._client.query_points(
            collection,
            query=list(vector),
            query_filter=which,
            score_threshold=threshold,
            limit=limit,
            with_payload=True,
        )
        return [Found(str(point.id), point.payload or {}, float(point.score)) for point in answer.points]

    async def write(self, collection: str, points: Sequence[Point]) -> None:
        """Write points, and wait until the server has stored them."""
        await self._client.upsert(collection, points=[point.as_struct() for point in points], wait=True)

    async def count(self, collection: str, which: models.Filter | None = None) -> int:
        """The number of points, or of those that pass the filter."""
        return (await self._client.count(collection, count_filter=which, exact=True)).count

    async def delete(self, collection: str, ids: Sequence[str]) -> None:
        """Delete points by their ids; ids that do not exist are ignored."""
        for start in range(0, len(ids), DELETE_CHUNK):
            selector = models.PointIdsList(points=list(ids[start : start + DELETE_CHUNK]))
            await self._client.delete(collection, points_selector=selector)

    async def ids(
        self,
        collection: str,
        limit: int,
        which: models.Filter | None = None,
        order_by: models.OrderBy | None = None,
    ) -> list[str]:
        """Ids of the points that pass the filter, in this order."""
        records, _next = await self._client.scroll(
            collection, scroll_filter=which, order_by=order_by, limit=limit, with_payload=False
        )
        return [str(record.id) for record in records]

    async def collections(self) -> list[str]:
        """The names of all collections."""
        return [found.name for found in (await self._client.get_collections()).collections]

    async def drop(self, collection: str) -> None:
        """Delete the collection with everything in it."""
        await self._client.delete_collection(collection)
