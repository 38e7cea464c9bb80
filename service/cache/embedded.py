"""The embedded vector store: Qdrant's local client, run in a thread of its own.

``AsyncQdrantClient(path=…)`` has the methods of a server's client and runs them on the event loop, including
disk access and filtering in Python. Here one thread owns the synchronous client, and callers await its
results.
"""

import asyncio
import itertools
import logging
import queue
import threading
import warnings
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from enum import IntEnum
from functools import partial
from pathlib import Path
from typing import IO, Any, Final, TypeVar

from qdrant_client import QdrantClient, models
from qdrant_client.local.qdrant_local import QdrantLocal

from service.cache.store import (
    COLLECTION,
    DELETE_CHUNK,
    Found,
    NoCollectionError,
    Point,
    StoreError,
    dimension_of,
    vectors_config,
)
from service.errors import UpstreamError

MEMORY = ":memory:"
OPEN_TIMEOUT_S = 10.0
"""How long the start of the process waits for the folder to be read."""

MAX_WAITING = 2_000
WRITE_CHUNK = 16
"""Points that are written before urgent work gets its turn."""

COMPACT_AFTER = 10_000
"""Deletions after which the client is opened again: it keeps deleted points in memory."""

LOCK_FILE = ".llmops.lock"
PRAGMAS: Final = ("PRAGMA journal_mode=WAL", "PRAGMA synchronous=NORMAL")
"""The client commits each point on its own; with SQLite's defaults, each commit waits for the disk (15 ms
measured). With these, a killed process loses nothing that was written and a crashed machine loses the last
seconds; the file stays intact in both cases (https://www.sqlite.org/pragma.html#pragma_synchronous)."""

T = TypeVar("T")

logger = logging.getLogger(__name__)


class Priority(IntEnum):
    """The order in which waiting work is done."""

    URGENT = 0
    LATER = 1
    LAST = 2


@dataclass(order=True, slots=True)
class _Job:
    """Work for the thread, ordered by priority and then by number."""

    priority: Priority
    number: int
    work: Callable[[], object] = field(compare=False)
    result: asyncio.Future[Any] = field(compare=False)


@asynccontextmanager
async def open_embedded(location: str) -> AsyncIterator["EmbeddedStore"]:
    """Open the store in a folder; leaving the block closes it.

    A folder that cannot be opened makes a store that is down and not a process that does not start, because
    everything but the cache works without it. Each ping tries again.

    Args:
        location: As ``EmbeddedStore`` has it.
    """
    store = EmbeddedStore(location)
    with suppress(Exception):  # logged by the store
        async with asyncio.timeout(OPEN_TIMEOUT_S):
            await store.open()
    try:
        yield store
    finally:
        await store.close()


class EmbeddedStore:
    """A ``VectorStore`` in a folder that belongs to this process.

    One thread owns the client. Urgent work goes first, and work whose caller has given up is not started. The
    thread is a daemon, so a disk that hangs does not keep the process from ending.

    Args:
        location: A folder, or ``:memory:``.
        max_waiting: How much work may wait.
    """

    shared = False
    attributes: Mapping[str, str | int] = {}

    def __init__(self, location: str, max_waiting: int = MAX_WAITING) -> None:
        self._location = location
        self._client: QdrantClient | None = None
        self._lock: IO[str] | None = None
        self._jobs: queue.PriorityQueue[_Job] = queue.PriorityQueue(max_waiting)
        self._numbers = itertools.count()
        self._deleted = 0
        self._failure_logged = False
        self._ended = False
        threading.Thread(target=self._serve, name="embedded qdrant", daemon=True).start()

    async def open(self) -> None:
        """Open the folder, unless it is open; raises whatever prevents it."""
        await self.run(self._open)

    async def close(self) -> None:
        """Close the folder after all waiting work, and end the thread."""
        await self.run(self._end, Priority.LAST)

    async def ping(self) -> None:
        """Open the store if it is not open, and ask for the collection."""
        try:
            await self.open()
            await self.run(lambda: self._opened().collection_exists(COLLECTION))
        except StoreError as error:
            raise UpstreamError(label=f"the store: {error.reason}") from None
        except Exception as error:  # noqa: BLE001 - a lock, a disk, a format: the store is down in any case
            raise UpstreamError(label=f"the store could not be opened: {type(error).__name__}") from None

    def translate(self, error: Exception) -> StoreError:
        """Name what the local client raised by its type."""
        return error if isinstance(error, StoreError) else StoreError(type(error).__name__)

    async def ensure(self, collection: str, dimension: int | None) -> None:
        """Create the collection, or replace it where its vectors have another dimension."""

        def create() -> None:
            client = self._opened()
            if client.collection_exists(collection):
                if dimension_of(client.get_collection(collection)) == dimension:
                    return
                client.delete_collection(collection)
            client.create_collection(collection, vectors_config=vectors_config(dimension))
            set_pragmas(client)

        await self.run(create)

    async def read(self, collection: str, point_id: str) -> Mapping[str, Any] | None:
        """The payload of the point with this id; None when there is none."""
        records = await self.run(
            lambda: self._opened(collection).retrieve(
                collection, ids=[point_id], with_payload=True, with_vectors=False
            )
        )
        return (records[0].payload or {}) if records else None

    async def search(
        self, collection: str, vector: Sequence[float], which: models.Filter, threshold: float, limit: int
    ) -> list[Found]:
        """The points most similar to the vector, best first, among those that pass the filter."""
        answer = await self.run(
            lambda: self._opened(collection).query_points(
                collection,
                query=list(vector),
                query_filter=which,
                score_threshold=threshold,
                limit=limit,
                with_payload=True,
            )
        )
        return [Found(str(point.id), point.payload or {}, float(point.score)) for point in answer.points]

    async def write(self, collection: str, points: Sequence[Point]) -> None:
        """Write points, a few at a time."""
        for start in range(0, len(points), WRITE_CHUNK):
            chunk = [point.as_struct() for point in points[start : start + WRITE_CHUNK]]
            await self.run(partial(self._upsert, collection, chunk), Priority.LATER)

    def _upsert(self, collection: str, points: list[models.PointStruct]) -> None:
        self._opened(collection).upsert(collection, points=points, wait=True)

    async def count(self, collection: str, which: models.Filter | None = None) -> int:
        """The number of points, or of those that pass the filter."""
        counted = await self.run(
            lambda: self._opened(collection).count(collection, count_filter=which, exact=True)
        )
        return counted.count

    async def delete(self, collection: str, ids: Sequence[str]) -> None:
        """Delete points by their ids; ids that do not exist are ignored."""
        for start in range(0, len(ids), DELETE_CHUNK):
            chunk: list[Any] = list(ids[start : start + DELETE_CHUNK])
            await self.run(partial(self._delete, collection, chunk), Priority.LATER)

    def _delete(self, collection: str, ids: list[Any]) -> None:
        client = self._opened(collection)
        # The local client hides a deleted point and keeps its payload in memory until it is opened again.
        with suppress(ValueError, KeyError):
            client.overwrite_payload(collection, payload={}, points=ids)
        client.delete(collection, points_selector=models.PointIdsList(points=ids))
        self._deleted += len(ids)
        if self._deleted >= COMPACT_AFTER and self._location != MEMORY:
            self._close_client()
            self._open()

    async def ids(
        self,
        collection: str,
        limit: int,
        which: models.Filter | None = None,
        order_by: models.OrderBy | None = None,
    ) -> list[str]:
        """Ids of the points that pass the filter, in this order."""
        records, _next = await self.run(
            lambda: self._opened(collection).scroll(
                collection, scroll_filter=which, order_by=order_by, limit=limit, with_payload=False
            ),
            Priority.LATER,
        )
        return [str(record.id) for record in records]

    async def collections(self) -> list[str]:
        """The names of all collections."""
        answer = await self.run(lambda: self._opened().get_collections())
        return [found.name for found in answer.collections]

    async def drop(self, collection: str) -> None:
        """Delete the collection with everything in it."""
        await self.run(lambda: self._opened().delete_collection(collection))

    async def run(self, work: Callable[[], T], priority: Priority = Priority.URGENT) -> T:
        """Let the thread do the work, and await its result; raises ``StoreError`` when too much waits."""
        result: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        try:
            self._jobs.put_nowait(_Job(priority, next(self._numbers), work, result))
        except queue.Full:
            raise StoreError("busy") from None
        return await result

    # All below runs in the thread.

    def _serve(self) -> None:
        while not self._ended:
            job = self._jobs.get()
            if job.result.cancelled() and job.priority is not Priority.LAST:
                continue
            value: object = None
            error: Exception | None = None
            try:
                value = job.work()
            except Exception as caught:  # noqa: BLE001 - raised again where the result is awaited
                error = caught
            # The loop may have been closed meanwhile.
            with suppress(RuntimeError):
                job.result.get_loop().call_soon_threadsafe(_settle, job.result, value, error)

    def _opened(self, collection: str | None = None) -> QdrantClient:
        """The client; raises ``StoreError`` where it is not open, or has no such collection."""
        if self._client is None:
            raise StoreError("not_open")
        if collection is not None and not self._client.collection_exists(collection):
            raise NoCollectionError
        return self._client

    def _open(self) -> None:
        if self._client is not None:
            return
        # Qdrant warns once in each process; the README explains the limits of the embedded store.
        warnings.filterwarnings("ignore", "Local mode is not recommended", UserWarning)
        try:
            if self._location == MEMORY:
                self._client = QdrantClient(location=MEMORY)
                return
            self._lock = self._lock or _lock(Path(self._location))
            self._client = QdrantClient(path=self._location, force_disable_check_same_thread=True)
        except Exception as error:
            if not self._failure_logged:
                logger.warning("The vector store cannot be opened: %s", type(error).__name__)
            self._failure_logged = True
            self._release()
            raise
        self._failure_logged = False
        set_pragmas(self._client)

    def _close_client(self) -> None:
        self._deleted = 0
        if self._client is not None:
            self._client.close()
            self._client = None

    def _end(self) -> None:
        self._ended = True
        self._close_client()
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def set_pragmas(client: QdrantClient) -> None:
    """Set ``PRAGMAS`` on the SQLite connection of each collection that is stored in a folder.

    ``synchronous`` belongs to a connection, and Qdrant has no setting for it: this is the one place that uses
    private attributes of Qdrant's client.
    """
    local = client._client  # noqa: SLF001 - as the docstring says
    if isinstance(local, QdrantLocal):
        for collection in local.collections.values():
            if collection.storage is not None:
                for pragma in PRAGMAS:
                    collection.storage.storage.execute(pragma)


def _lock(folder: Path) -> IO[str]:
    """Lock the folder against other processes; Qdrant's own lock comes after it has read the whole folder."""
    # Imported here, as Qdrant does: its import looks for a folder that it can write to, and a full disk must
    # not keep the service from starting.
    import portalocker  # noqa: PLC0415 - as said

    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / LOCK_FILE).open("w", encoding="utf-8")
    try:
        portalocker.lock(file, portalocker.LockFlags.EXCLUSIVE | portalocker.LockFlags.NON_BLOCKING)
    except BaseException:
        file.close()
        raise
    return file


def _settle(result: asyncio.Future[Any], value: object, error: Exception | None) -> None:
    if result.done():
        return
    if error is None:
        result.set_result(value)
    else:
        result.set_exception(error)
