"""The embedded vector store: Qdrant's local client, run in a thread of its own.

``AsyncQdrantClient(path=…)`` has the methods of a server's client and runs them on the event loop, including
disk access and filtering in Python. Here one thread owns the synchronous client, and callers await its
results.
"""

import asyncio
import heapq
import itertools
import logging
import queue
import sys
import threading
import time
import warnings
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from enum import IntEnum
from functools import partial
from pathlib import Path
from typing import IO, Any, Final, TypeVar

from qdrant_client.http import models
from qdrant_client.local.qdrant_local import QdrantLocal

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
from service.errors import UpstreamError

MEMORY = ":memory:"
OPEN_TIMEOUT_S = 10.0
"""How long the start of the process waits for the folder to be read."""

MAX_WAITING = 2_000
SLICE_S = 0.005
"""How long writing, and the sweep, keep the thread before a look-up gets its turn: a slice ends with the step
in which this time is over."""

SCAN_STEP = 1_000
DELETE_STEP = 8
WRITE_STEP = 1
"""After so many points the clock is looked at."""

COMPACT_AFTER = 10_000
"""Deletions after which the client is opened again: it keeps deleted points in memory."""

LOCK_FILE = ".llmops.lock"
PRAGMAS: Final = ("PRAGMA journal_mode=WAL", "PRAGMA synchronous=NORMAL")
"""The client commits each point on its own; with SQLite's defaults, each commit waits for the disk (15 ms
measured). With these, a killed process loses nothing that was written and a crashed machine loses the last
seconds; the file stays intact in both cases (https://www.sqlite.org/pragma.html#pragma_synchronous)."""

MAX_POINTS = 1_000_000_000

USED_MODELS: Final = (
    *(models.PointStruct, models.PointIdsList, models.UpdateResult, models.Record),
    *(models.Filter, models.FieldCondition, models.MatchValue, models.Range),
    *(models.NearestQuery, models.QueryResponse, models.ScoredPoint),
)
"""Pydantic builds a model at its first use, which takes up to 8 ms here; the start does it for these."""

Fields = Mapping[str, Any]
"""The indexed fields of a point's payload."""

T = TypeVar("T")

logger = logging.getLogger(__name__)


class Priority(IntEnum):
    """The order in which waiting work is done: what a caller waits for goes before what keeps the store."""

    LOOKUP = 0
    WRITE = 1
    SWEEP = 2
    LAST = 3


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

    One thread owns the client. Look-ups go first, and work whose caller has given up is not started. The
    thread is a daemon, so a disk that hangs does not keep the process from ending.

    The local client tests a filter against each point in one call, a third of a second for 20,000 points. So
    this class keeps the indexed fields of each point, and finds points by them in slices.

    Args:
        location: A folder, or ``:memory:``.
        max_waiting: How much work may wait.
        slice_s: How long work that is no look-up keeps the thread.
        clock: Monotonic, in seconds.
    """

    shared = False
    attributes: Mapping[str, str | int] = {}

    def __init__(
        self,
        location: str,
        max_waiting: int = MAX_WAITING,
        *,
        slice_s: float = SLICE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._location = location
        self._slice_s = slice_s
        self._clock = clock
        self._fields: dict[str, dict[str, Fields]] = {}
        self._compacting = False
        self._client: QdrantLocal | None = None
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
            self._fields[collection] = {}
            client.create_collection(collection, vectors_config=vectors_config(dimension))
            set_pragmas(client)

        await self.run(create)

    async def read(self, collection: str, point_id: str) -> Mapping[str, Any] | None:
        """The payload of the point with this id; None when there is none, and during compaction."""
        if self._compacting:
            return None
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
        if self._compacting:
            return []
        answer = await self.run(
            lambda: self._opened(collection).query_points(
                collection,
                query=models.NearestQuery(nearest=list(vector)),
                query_filter=which,
                score_threshold=threshold,
                limit=limit,
                with_payload=True,
            )
        )
        return [Found(str(point.id), point.payload or {}, float(point.score)) for point in answer.points]

    async def write(self, collection: str, points: Sequence[Point]) -> None:
        """Write points, in slices."""
        await self._in_slices(points, WRITE_STEP, partial(self._upsert, collection), Priority.WRITE)

    def _upsert(self, collection: str, points: Sequence[Point]) -> None:
        structs = [point.as_struct() for point in points]
        self._opened(collection).upsert(collection, points=structs, wait=True)
        self._fields[collection].update({point.id: _indexed(point.payload) for point in points})

    async def count(self, collection: str, which: models.Filter | None = None) -> int:
        """The number of points, or of those that pass the filter."""
        if which is not None:
            return len(await self.ids(collection, sys.maxsize, which))
        return await self.run(lambda: len(self._known(collection)))

    async def delete(self, collection: str, ids: Sequence[str]) -> None:
        """Delete points by their ids, in slices; ids that do not exist are ignored."""
        await self._in_slices(ids, DELETE_STEP, partial(self._delete, collection), Priority.SWEEP)
        if self._deleted >= COMPACT_AFTER and self._location != MEMORY and not self._compacting:
            # Look-ups find nothing meanwhile, which is better than that they wait for longer than they may.
            self._compacting = True
            try:
                await self.run(self._compact, Priority.SWEEP)
            finally:
                self._compacting = False

    def _delete(self, collection: str, ids: Sequence[str]) -> None:
        client = self._opened(collection)
        known = self._fields[collection]
        chunk: list[Any] = [point_id for point_id in ids if point_id in known]
        if not chunk:
            return
        # The local client hides a deleted point and keeps its payload in memory until it is opened again.
        with suppress(ValueError, KeyError):
            client.overwrite_payload(collection, payload={}, points=chunk)
        client.delete(collection, points_selector=models.PointIdsList(points=chunk))
        for point_id in chunk:
            del known[point_id]
        self._deleted += len(chunk)

    def _compact(self) -> None:
        self._close_client()
        self._open()

    async def ids(
        self,
        collection: str,
        limit: int,
        which: models.Filter | None = None,
        order_by: models.OrderBy | None = None,
    ) -> list[str]:
        """Ids of the points that pass the filter, in this order; found in slices."""
        key = None if order_by is None else order_by.key
        everything = await self.run(lambda: list(self._known(collection)), Priority.SWEEP)
        found: list[tuple[Any, str]] = []

        def scan(ids: Sequence[str]) -> None:
            # Points may have been deleted since, even the whole collection.
            known = self._fields.get(collection, {})
            passing = (point_id for point_id in ids if point_id in known and _passes(known[point_id], which))
            if key is None:
                found.extend((None, point_id) for point_id in itertools.islice(passing, limit - len(found)))
            else:
                entries = [(known[point_id].get(key, 0), point_id) for point_id in passing]
                found[:] = heapq.nsmallest(limit, found + entries)

        await self._in_slices(everything, SCAN_STEP, scan, Priority.SWEEP)
        return [point_id for _, point_id in found]

    async def _in_slices(
        self, items: Sequence[T], step: int, work: Callable[[Sequence[T]], None], priority: Priority
    ) -> None:
        """Let the thread do the work for all items, and waiting work of a higher priority in between."""

        def one_slice(start: int) -> int:
            end_s = self._clock() + self._slice_s
            while start < len(items):
                work(items[start : start + step])
                start += step
                if self._clock() >= end_s:
                    break
            return start

        done = 0
        while done < len(items):
            done = await self.run(partial(one_slice, done), priority)

    async def collections(self) -> list[str]:
        """The names of all collections."""
        answer = await self.run(lambda: self._opened().get_collections())
        return [found.name for found in answer.collections]

    async def drop(self, collection: str) -> None:
        """Delete the collection with everything in it."""

        def delete() -> None:
            self._opened().delete_collection(collection)
            self._fields.pop(collection, None)

        await self.run(delete)

    async def run(self, work: Callable[[], T], priority: Priority = Priority.LOOKUP) -> T:
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

    def _opened(self, collection: str | None = None) -> QdrantLocal:
        """The client; raises ``StoreError`` where it is not open, or has no such collection."""
        if self._client is None:
            raise StoreError("not_open")
        if collection is not None and not self._client.collection_exists(collection):
            raise NoCollectionError
        return self._client

    def _known(self, collection: str) -> dict[str, Fields]:
        """The indexed fields of each point by its id; raises as ``_opened``."""
        self._opened(collection)
        return self._fields[collection]

    def _open(self) -> None:
        if self._client is not None:
            return
        for model in USED_MODELS:
            model.model_rebuild()
        # Qdrant warns once in each process; the README explains the limits of the embedded store.
        warnings.filterwarnings("ignore", "Local mode is not recommended", UserWarning)
        try:
            if self._location == MEMORY:
                self._client = QdrantLocal(location=MEMORY)
                self._fields = {}
                return
            self._lock = self._lock or _lock(Path(self._location))
            self._client = QdrantLocal(location=self._location, force_disable_check_same_thread=True)
        except Exception as error:
            if not self._failure_logged:
                logger.warning("The vector store cannot be opened: %s", type(error).__name__)
            self._failure_logged = True
            self._release()
            raise
        self._failure_logged = False
        set_pragmas(self._client)
        self._read_fields(self._client)

    def _read_fields(self, client: QdrantLocal) -> None:
        self._fields = {}
        for collection in client.get_collections().collections:
            records, _next = client.scroll(
                collection.name, limit=MAX_POINTS, with_payload=list(INDEXES), with_vectors=False
            )
            self._fields[collection.name] = {
                str(record.id): _indexed(record.payload or {}) for record in records
            }

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


def set_pragmas(client: QdrantLocal) -> None:
    """Set ``PRAGMAS`` on the SQLite connection of each collection that is stored in a folder.

    ``synchronous`` belongs to a connection, and Qdrant has no setting for it.
    """
    for collection in client.collections.values():
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


def _indexed(payload: Mapping[str, Any]) -> Fields:
    return {name: payload[name] for name in INDEXES if name in payload}


def _passes(fields: Fields, which: models.Filter | None) -> bool:
    """Whether a point passes a filter as this service makes them: of values, and of upper limits."""
    if which is None:
        return True
    for condition in which.must if isinstance(which.must, list) else ():
        match condition:
            case models.FieldCondition(key=key, match=models.MatchValue(value=wanted)):
                if fields.get(key) != wanted:
                    return False
            case models.FieldCondition(key=key, range=models.Range(lte=limit)):
                value = fields.get(key)
                if limit is None or not isinstance(value, (int, float)) or value > limit:
                    return False
            case _:
                raise StoreError("unknown_filter")
    return True


def _settle(result: asyncio.Future[Any], value: object, error: Exception | None) -> None:
    if result.done():
        return
    if error is None:
        result.set_result(value)
    else:
        result.set_exception(error)
