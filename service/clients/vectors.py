"""The vector store: open, ping, close; the only importer of ``qdrant_client``."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio.to_thread
from qdrant_client import AsyncQdrantClient

from service.config.settings import Settings
from service.errors import UpstreamError

MEMORY = ":memory:"
COLLECTION = "llmops_cache"

logger = logging.getLogger(__name__)


@asynccontextmanager
async def open_vectors(settings: Settings) -> AsyncIterator["Vectors"]:
    """Open the store: a server's client, or the embedded one.

    A folder that cannot be opened makes a store that is down, not a service that does not start: the cache is
    worth nothing without it, and everything else works.
    """
    client: AsyncQdrantClient | None = None
    try:
        client = await anyio.to_thread.run_sync(_client, settings)
    except Exception as error:  # noqa: BLE001 - a lock, a disk, a format: the store is down whatever it was
        logger.warning("The vector store cannot be opened: %s", type(error).__name__)
    try:
        yield Vectors(client)
    finally:
        if client is not None:
            await client.close()


def _client(settings: Settings) -> AsyncQdrantClient:
    if settings.qdrant_url:
        return AsyncQdrantClient(
            url=settings.qdrant_url,
            api_key=settings.qdrant_api_key.get_secret_value() or None,
            timeout=settings.qdrant_timeout_s,
            check_compatibility=False,
        )
    if settings.qdrant_path == MEMORY:
        return AsyncQdrantClient(location=MEMORY)
    return AsyncQdrantClient(path=settings.qdrant_path)


class Vectors:
    """The store, which may be down; made by ``open_vectors``."""

    def __init__(self, client: AsyncQdrantClient | None) -> None:
        self._client = client

    async def ping(self) -> None:
        """Ask for the collection, which reaches the storage; raises when the store is down."""
        if self._client is None:
            raise UpstreamError(label="the store could not be opened")
        await self._client.collection_exists(COLLECTION)
