"""Qdrant's embedded store in a thread of its own: its client works on the caller's time otherwise.

``AsyncQdrantClient(path=…)`` has the same methods as a server's client and runs them on the event loop, disk
and filters in Python included. Here the synchronous client belongs to one thread, and callers await it.
"""

import asyncio
import itertools
import logging
import queue
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from qdrant_client import QdrantClient

MEMORY = ":memory:"
MAX_WAITING = 2_000
URGENT, LATER, LAST = 0, 1, 2
COMPACT_AT = 10_000
"""Deleted points that the embedded client keeps in memory before it is opened anew, without them."""

RELAXED: Final = ("PRAGMA journal_mode=WAL", "PRAGMA synchronous=NORMAL")
"""One commit a point is what the embedded client makes; with SQLite's defaults each waits for the disk (15 ms
measured). So set, a killed process loses nothing that was written and a dead machine the last seconds; the
file stays whole in both cases (https://www.sqlite.org/pragma.html#pragma_synchronous)."""

logger = logging.getLogger(__name__)

Work = Callable[[Any], Any]


class ClosedStoreError(Exception):
    """The store is not open: its folder cannot be used, or is being opened."""


class BusyStoreError(Exception):
    """Too much work waits for the store."""


class EmbeddedStore:
    """One thread that owns the client.

    What is urgent goes before what can wait; what nobody waits for any more is not begun. A thread that hangs
    in the disk is a daemon's, so it does not keep the process from ending.

    Args:
        location: A folder, or ``:memory:``, whose deleted points stay in memory.
        max_waiting: Pieces of work that may wait.
    """

    def __init__(self, location: str, max_waiting: int = MAX_WAITING) -> None:
        self._location = location
        self._client: QdrantClient | None = None
        self._queue: queue.PriorityQueue[tuple[int, int, Work, asyncio.Future[Any], Any]]
        self._queue = queue.PriorityQueue(max_waiting)
        self._numbers = itertools.count()
        self._relaxed: set[str] = set()
        self.deleted = 0
        self._said = False
        threading.Thread(target=self._serve, name="embedded qdrant", daemon=True).start()

    async def run(self, work: Work, *, urgency: int = URGENT) -> Any:  # noqa: ANN401 - what the client gives
        """Let the thread do something with the client, and await it.

        Raises:
            BusyStoreError: Too much waits already.
            ClosedStoreError: There is no open store.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        try:
            self._queue.put_nowait((urgency, next(self._numbers), work, future, loop))
        except queue.Full:
            raise BusyStoreError from None
        return await future

    async def open(self) -> None:
        """Open the folder, if it is not open; raises what stands against it."""
        await self.run(_OPEN)

    async def close(self) -> None:
        """Close the folder when what waits is done, and end the thread."""
        await self.run(_CLOSE, urgency=LAST)

    def _serve(self) -> None:
        work: Work | None = None
        while work is not _CLOSE:
            _, _, work, future, loop = self._queue.get()
            if future.cancelled() and work is not _CLOSE:
                continue
            result: object = None
            error: Exception | None = None
            try:
                result = self._do(work)
            except Exception as caught:  # noqa: BLE001 - it is the caller's, who awaits it
                error = caught
            # A loop that has ended wants no results.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(_settle, future, result, error)

    def _do(self, work: Work) -> object:
        if work is _OPEN:
            self._open()
            return None
        if work is _CLOSE:
            self._close()
            return None
        if self._client is None:
            raise ClosedStoreError
        result = work(self._client)
        self._relax()
        if self.deleted >= COMPACT_AT and self._location != MEMORY:
            self._close()
            self._open()
        return result

    def _open(self) -> None:
        if self._client is not None:
            return
        # Said once for each process by Qdrant, as a warning; the README says it better.
        warnings.filterwarnings("ignore", "Local mode is not recommended", UserWarning)
        try:
            if self._location == MEMORY:
                self._client = QdrantClient(location=MEMORY)
                return
            _refuse_locked(Path(self._location))
            self._client = QdrantClient(path=self._location, force_disable_check_same_thread=True)
        except Exception as error:
            if not self._said:
                logger.warning("The vector store cannot be opened: %s", type(error).__name__)
            self._said = True
            raise
        self._said = False
        self._relax()

    def _close(self) -> None:
        self.deleted = 0
        self._relaxed.clear()
        if self._client is not None:
            self._client.close()
            self._client = None

    def _relax(self) -> None:
        """See to it that no commit waits for the disk; a client of another make is left as it is."""
        local = getattr(self._client, "_client", None)
        for name, collection in getattr(local, "collections", {}).items():
            connection = getattr(getattr(collection, "storage", None), "storage", None)
            if connection is not None and name not in self._relaxed:
                for pragma in RELAXED:
                    connection.execute(pragma)
                self._relaxed.add(name)


def _OPEN(_client: object) -> None:  # noqa: N802 - a mark, told by identity
    """Stands for opening."""


def _CLOSE(_client: object) -> None:  # noqa: N802 - a mark, told by identity
    """Stands for closing."""


def _settle(future: asyncio.Future[Any], result: object, error: Exception | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


def _refuse_locked(folder: Path) -> None:
    """Raise when another process has the folder: Qdrant itself reads all of it before it looks."""
    # Imported here, as Qdrant does: it looks for a folder that can be written to when it is imported, and a
    # disk that is full must not keep the service from starting.
    import portalocker  # noqa: PLC0415 - as said

    lock = folder / ".lock"
    if lock.exists():
        with lock.open("r+") as file:
            portalocker.lock(file, portalocker.LockFlags.EXCLUSIVE | portalocker.LockFlags.NON_BLOCKING)
            portalocker.unlock(file)
