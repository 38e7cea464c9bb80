"""The spool: files of records on disk that wait for MLflow, and the orphaned spools of ended processes.

All processes share one folder. Each holds an exclusive lock on a file of its own while it lives; the files of
a process whose lock is free are orphaned, and whoever gets the lock may send and remove them.
"""

import errno
import fcntl
import logging
import os
import re
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from service.recording.record import read_records

SEGMENT_RECORDS = 100
SEGMENT_BYTES = 131_072
"""A file is closed at this size and sent as one export; a crash can repeat one file, so files are small."""

SPOOL_NAME = re.compile(r"[0-9]{8}T[0-9]{6}-[0-9]+-[0-9a-f]{6}")
"""The name of a process's spool: its start time, its process id, and six random hex digits."""

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Segment:
    """One file of records.

    Args:
        path: Where the file is.
        began_s: When it was created, on the spool's clock.
        records: The number of records in it.
        size_bytes: Its size.
        spooled: How many of its records are counted as waiting because MLflow failed.
        synced: Whether it has been written through to the disk.
        sent: Whether MLflow has its records; the ledger may not have them yet.
    """

    path: Path
    began_s: float
    records: int = 0
    size_bytes: int = 0
    spooled: int = 0
    synced: bool = False
    sent: bool = False


class Spool:
    """The files of this process. ``append`` may be called from any thread, the rest from the recorder's only.

    Args:
        folder: Shared by all processes of the service on this machine; created if it does not exist.
        max_bytes: The limit of all files together; beyond it the oldest file is dropped.
        on_lost: Called with the number of records dropped, and the reason.
        clock: Monotonic, in seconds, so that a change of the system time does not expire files.

    Raises:
        OSError: The folder cannot be created or written to.
    """

    def __init__(
        self,
        folder: Path,
        max_bytes: int,
        on_lost: Callable[[int, str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder = folder
        self._max_bytes = max_bytes
        self._on_lost = on_lost
        self._clock = clock
        self._lock = threading.Lock()
        self._sealed: deque[Segment] = deque()
        self._open: Segment | None = None
        self._descriptor = -1
        self._next = 0
        self._size_bytes = 0
        self._closed = False
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.name, self._lock_descriptor = _create_lock(folder)

    @property
    def files(self) -> int:
        """How many files ``take`` can return now."""
        with self._lock:
            return len(self._sealed) + (self._open is not None)

    def append(self, line: bytes, *, spooled: bool) -> bool:
        """Write one line; returns whether that completed a file.

        Args:
            line: Includes its line feed.
            spooled: Whether the record is counted as waiting because MLflow failed.

        Raises:
            OSError: The line cannot be written, and nothing of it is left in the file. Always raised after
                ``close``, when another process may own the files.
        """
        with self._lock:
            if self._closed:
                raise OSError(errno.EBADF, "the spool is closed")
            if len(line) > self._max_bytes:
                raise OSError(errno.EFBIG, "the line is larger than the limit of the spool")
            self._make_room(len(line))
            segment = self._open or self._create_segment()
            try:
                complete = os.write(self._descriptor, line) == len(line)
            except OSError:
                self._remove_partial_line(segment)
                raise
            if not complete:
                self._remove_partial_line(segment)
                raise OSError("the line was written in part")
            segment.records += 1
            segment.spooled += spooled
            segment.size_bytes += len(line)
            segment.synced = False
            self._size_bytes += len(line)
            full = segment.records >= SEGMENT_RECORDS or segment.size_bytes >= SEGMENT_BYTES
            if full:
                self._seal()
            return full

    def _create_segment(self) -> Segment:
        path = self.folder / f"{self.name}.{self._next:06d}.jsonl"
        self._descriptor = os.open(
            path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC, 0o600
        )
        self._next += 1
        self._open = Segment(path, self._clock())
        return self._open

    def _remove_partial_line(self, segment: Segment) -> None:
        # If that fails, the partial line is the last of its file, and readers ignore it. The next line goes
        # into a new file in any case, as this one may have reached a limit on the size of files.
        removed = False
        with suppress(OSError):
            os.ftruncate(self._descriptor, segment.size_bytes)
            removed = True
        if segment.records or not removed:
            self._seal()

    def _make_room(self, size_bytes: int) -> None:
        while self._size_bytes + size_bytes > self._max_bytes and (self._sealed or self._open):
            if not self._sealed:
                self._seal()
            self._drop(self._sealed.popleft(), "the spool is full")

    def _drop(self, segment: Segment, reason: str) -> None:
        self._size_bytes -= segment.size_bytes
        with suppress(OSError):
            segment.path.unlink(missing_ok=True)
        if segment.sent:
            logger.error("The ledger does not have the records of a file that was dropped: %s", reason)
        elif segment.records:
            self._on_lost(segment.records, reason)

    def _seal(self) -> None:
        if self._open is None:
            return
        with suppress(OSError):
            os.close(self._descriptor)
        self._sealed.append(self._open)
        self._open = None

    def count_spooled(self) -> int:
        """Count all records as waiting because MLflow failed; returns how many were not counted before."""
        with self._lock:
            segments = [*self._sealed, *([self._open] if self._open else [])]
            segments = [segment for segment in segments if not segment.sent]
            new = sum(segment.records - segment.spooled for segment in segments)
            for segment in segments:
                segment.spooled = segment.records
            return new

    def take(self) -> Segment | None:
        """Hand over the oldest file, which the caller then owns; None when there is none."""
        with self._lock:
            if not self._sealed:
                self._seal()
            return self._sealed.popleft() if self._sealed else None

    def put_back(self, segment: Segment, *, last: bool = False) -> None:
        """Return a file that was taken: before all others, or behind them."""
        with self._lock:
            if last:
                self._seal()
                self._sealed.append(segment)
            else:
                self._sealed.appendleft(segment)

    def done(self, segment: Segment) -> None:
        """Remove a file that was taken: its records were sent."""
        with self._lock:
            self._size_bytes -= segment.size_bytes
        with suppress(OSError):
            segment.path.unlink(missing_ok=True)

    def expire(self, max_age_s: float) -> None:
        """Drop the files that are older than this."""
        with self._lock:
            while self._sealed and self._clock() - self._sealed[0].began_s > max_age_s:
                self._drop(self._sealed.popleft(), "too old")

    def sync(self) -> None:
        """Write all files through to the disk."""
        with self._lock:
            segments = [*self._sealed, *([self._open] if self._open else [])]
            unsynced = [segment for segment in segments if not segment.synced]
            for segment in unsynced:
                segment.synced = True
        for segment in unsynced:
            # The file was removed meanwhile, or the disk fails: the next append reports that.
            with suppress(OSError):
                sync_file(segment.path)
        if unsynced:
            # The entries of new files are in the folder, which must be synced by itself.
            with suppress(OSError):
                sync_file(self.folder)

    def close(self) -> None:
        """Release the lock, so that other processes may take the files over; an empty spool is removed."""
        with self._lock:
            self._closed = True
            self._seal()
            if not spool_files(self.folder, self.name):
                with suppress(OSError):
                    lock_path(self.folder, self.name).unlink(missing_ok=True)
            os.close(self._lock_descriptor)


def _create_lock(folder: Path) -> tuple[str, int]:
    """Choose a new name and lock it until the process ends; returns the name and the lock's descriptor."""
    while True:
        moment = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
        name = f"{moment}-{os.getpid()}-{secrets.token_hex(3)}"
        path = lock_path(folder, name)
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            # Another process may have locked and removed the file in between, taking it for an orphan's.
            if try_lock(descriptor, path):
                return name, descriptor
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)


def try_lock(descriptor: int, path: Path) -> bool:
    """Lock a file that was opened at this path; returns whether this process has it, and it is still there.

    The owner of a lock removes its file with the last file of the spool. A descriptor that was opened before
    that and locked after it excludes nobody.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return path.stat().st_ino == os.fstat(descriptor).st_ino
    except (BlockingIOError, FileNotFoundError):
        return False


def run_file(folder: Path, name: str) -> Path:
    """The file that describes the MLflow run of the process of a spool."""
    return folder / f"{name}.run.json"


def lock_path(folder: Path, name: str) -> Path:
    """The file that the process of a spool locks while it lives."""
    return folder / f"{name}.lock"


def spool_files(folder: Path, name: str) -> list[Path]:
    """The files of a spool, except for its lock."""
    return sorted(path for path in folder.glob(f"{name}.*") if path.suffix != ".lock")


def sync_file(path: Path) -> None:
    """Write a file or folder through to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class OrphanedSpool:
    """The files of a process that has ended, locked by this one."""

    folder: Path
    name: str

    @property
    def segments(self) -> list[Path]:
        """Its files of records, oldest first."""
        return [path for path in spool_files(self.folder, self.name) if path.suffix == ".jsonl"]

    @property
    def run_file(self) -> Path:
        """The file that describes the MLflow run of the process."""
        return run_file(self.folder, self.name)

    @property
    def last_written_s(self) -> float:
        """When the process last wrote to one of the files, in Unix time."""
        paths = [*self.segments, self.run_file]
        return max((path.stat().st_mtime for path in paths if path.exists()), default=time.time())

    def expire(self, max_age_s: float) -> int:
        """Remove the files that are older; returns how many records they had."""
        removed = 0
        for path in self.segments:
            # A file that cannot be read stays, and does not stop the others.
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > max_age_s:
                    records, invalid = read_records(path)
                    path.unlink()
                    removed += len(records) + invalid
        return removed

    def clear(self) -> None:
        """Remove the files that are left; ``orphaned_spools`` removes the lock when it goes on."""
        for path in spool_files(self.folder, self.name):
            path.unlink(missing_ok=True)


def orphaned_spools(folder: Path) -> Generator[OrphanedSpool]:
    """The spool of each ended process, oldest first; locked until the next one is asked for.

    Raises:
        OSError: The folder cannot be read.
    """
    try:
        names = {path.name.split(".", 1)[0] for path in folder.iterdir()}
    except FileNotFoundError:
        return
    for name in sorted(filter(SPOOL_NAME.fullmatch, names)):
        with _taken_over(folder, name) as locked:
            # There are no files where another process was faster, or where a process ended between two steps.
            if locked and spool_files(folder, name):
                yield OrphanedSpool(folder, name)


@contextmanager
def _taken_over(folder: Path, name: str) -> Iterator[bool]:
    """Try to lock a spool; on exit its lock is removed if no files are left."""
    path = lock_path(folder, name)
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError:
        yield False
        return
    try:
        locked = False
        with suppress(OSError):
            locked = try_lock(descriptor, path)
        yield locked
        if locked and not spool_files(folder, name):
            path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)
