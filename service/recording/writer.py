"""Writes records to the spool in a thread of its own, from a bounded queue in memory.

A disk may refuse a write, and it may not answer at all. Neither may stop the event loop, so that nothing here
that the event loop calls touches the disk, or holds a lock while it does.
"""

import asyncio
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from service.recording.record import CallRecord

MEMORY_RECORDS = 10_000
MEMORY_BYTES = 16_777_216
"""Limits of the records, and of their lines, that are in memory only; beyond them records are lost."""

DISK_TIMEOUT_S = 0.25
"""How long an answer waits for its record to be written. After that no answer waits until the disk works."""

HANG_LOG_INTERVAL_S = 60.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Entry:
    """A record that is in memory only, and its line."""

    record: CallRecord
    line: bytes


@dataclass(frozen=True, slots=True)
class _Waiter:
    """Somebody who waits until the records before are written."""

    loop: asyncio.AbstractEventLoop
    written: asyncio.Future[bool]
    """True when they are written, False when that took too long."""

    def release(self) -> None:
        try:
            self.loop.call_soon_threadsafe(self.settle, True)  # noqa: FBT003 - what ``written`` becomes
        except RuntimeError:
            # The loop is closed: nobody waits any more.
            return

    def settle(self, written: bool) -> None:  # noqa: FBT001 - as above
        if not self.written.done():
            self.written.set_result(written)


class SpoolWriter:
    """A queue of records and the thread that writes them; thread-safe.

    A new record is tried once. If the disk refuses it, it waits until ``retry`` is called, or ``take`` hands
    it over to be sent from memory.

    Args:
        append: Writes a line to the spool, and raises ``OSError`` if the disk refuses it; None where there is
            no spool, so that all records wait to be taken.
        on_lost: Called with the number of records that are lost, and the reason.
        timeout_s: How long ``written`` waits.
        clock: Monotonic, in seconds.
    """

    def __init__(
        self,
        append: Callable[[bytes], None] | None,
        on_lost: Callable[[int, str], None],
        *,
        timeout_s: float = DISK_TIMEOUT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._append = append
        self._on_lost = on_lost
        self._timeout_s = timeout_s
        self._clock = clock
        self._lock = threading.Lock()
        self._new: deque[Entry] = deque()
        self._refused: deque[Entry] = deque()
        self._waiters: list[_Waiter] = []
        # What is in memory, with what is being written or sent at the moment.
        self._records = self._bytes = 0
        # Of all that wakes a thread it takes the least time.
        self._rounds: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._retry = self._stopping = self._ended = False
        self._hangs = False
        self._hang_logged_s = float("-inf")
        self._thread = threading.Thread(target=self._work, name="spool writer", daemon=True)

    @property
    def records(self) -> int:
        """How many records are in memory only."""
        return self._records

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def put(self, entry: Entry) -> None:
        """Take a record; one that memory has no room for is lost. Does not block."""
        with self._lock:
            room = self._records < MEMORY_RECORDS and self._bytes + len(entry.line) <= MEMORY_BYTES
            if room and not self._ended:
                (self._refused if self._append is None else self._new).append(entry)
                self._records += 1
                self._bytes += len(entry.line)
                self._wake()
                return
        self._on_lost(1, "the disk takes nothing, and memory is full")

    async def written(self) -> None:
        """Wait until the records so far are written or refused; not for a disk that does not answer."""
        if self._append is None or self._hangs or self._stopping:
            return
        loop = asyncio.get_running_loop()
        waiter = _Waiter(loop, loop.create_future())
        with self._lock:
            if self._records == len(self._refused):
                return
            self._waiters.append(waiter)
        self._wake()
        # Not asyncio.timeout, which takes several times as long.
        timer = loop.call_later(self._timeout_s, waiter.settle, False)  # noqa: FBT003 - as above
        try:
            if not await waiter.written:
                self._set_hanging()
        finally:
            timer.cancel()

    def _set_hanging(self) -> None:
        self._hangs = True
        if self._clock() - self._hang_logged_s >= HANG_LOG_INTERVAL_S:
            self._hang_logged_s = self._clock()
            logger.warning(
                "The disk of the spool does not answer: records wait in memory",
                extra={"records": self._records},
            )

    def retry(self) -> None:
        """Let the thread try again to write what the disk has refused."""
        self._retry = True
        self._wake()

    def _wake(self) -> None:
        """Let the thread make a round; more than one waiting for it is one."""
        if self._rounds.empty():
            self._rounds.put(None)

    def take(self, limit: int) -> list[Entry]:
        """Hand over records that the disk has refused; ``done`` or ``put_back`` gets them afterwards."""
        with self._lock:
            return [self._refused.popleft() for _entry in range(min(limit, len(self._refused)))]

    def put_back(self, entries: list[Entry]) -> None:
        """Return records that were taken, before all others."""
        with self._lock:
            if not self._ended:
                self._refused.extendleft(reversed(entries))

    def done(self, entries: list[Entry]) -> None:
        """Forget records that are not in memory only any more."""
        with self._lock:
            if not self._ended:
                self._records -= len(entries)
                self._bytes -= sum(len(entry.line) for entry in entries)

    def stop(self) -> None:
        """Try to write everything, and end the thread; blocks as long as the disk does."""
        self._stopping = True
        self.retry()
        self._thread.join()

    def write(self) -> None:
        """Try to write everything in this thread, after ``stop``."""
        self._retry = True
        self._round()

    def end(self) -> int:
        """Give up what is in memory, and what comes later; returns how many records were lost by that."""
        with self._lock:
            left = 0 if self._ended else self._records
            self._ended = True
            self._new.clear()
            self._refused.clear()
            self._records = self._bytes = 0
            return left

    def _work(self) -> None:
        stopping = False
        while not stopping:
            self._rounds.get()
            stopping = self._stopping
            self._round()

    def _round(self) -> None:
        with self._lock:
            # Whoever is in the list now has put the record into the queue before.
            waiters, self._waiters = self._waiters, []
            new = len(self._new)
        self._write_some(self._new, new, stop_at_refusal=False)
        for waiter in waiters:
            waiter.release()
        if self._retry:
            self._retry = False
            self._write_some(self._refused, len(self._refused), stop_at_refusal=True)
        if self._hangs:
            self._hangs = False
            logger.info("The disk of the spool answers again", extra={"records": self._records})

    def _write_some(self, queue: deque[Entry], count: int, *, stop_at_refusal: bool) -> None:
        """Write so many records of a queue: while calls go on, it may never be empty."""
        for _entry in range(count if self._append else 0):
            with self._lock:
                if not queue:
                    return
                entry = queue.popleft()
            if self._is_refused(entry):
                with self._lock:
                    if not self._ended:
                        (self._refused.appendleft if stop_at_refusal else self._refused.append)(entry)
                if stop_at_refusal:
                    return

    def _is_refused(self, entry: Entry) -> bool:
        """Write a record; returns whether the disk refuses it."""
        try:
            if self._append is not None:
                self._append(entry.line)
        except OSError:
            return True
        except Exception:
            # A bug here must not end the thread.
            logger.exception("A record could not be written")
            self._on_lost(1, "a bug")
        self.done([entry])
        return False
