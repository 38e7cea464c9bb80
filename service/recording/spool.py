"""What dead processes left in the spool, for whoever brings it to its end."""

import errno
import fcntl
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

from service.recording.record import read

SEGMENT_RECORDS = 100
SEGMENT_BYTES = 131_072
"""A file is closed at this size, and is sent as one piece. Small ones: a piece is what a crash can repeat."""

OWNER = re.compile(r"[0-9]{8}T[0-9]{6}-[0-9]+-[0-9a-f]{6}")
"""How a process is named here: when it began, its number, and six hex digits."""


@dataclass(slots=True)
class Segment:
    """One file of lines.

    Args:
        path: Where it is.
        began_s: When it was begun, on the spool's clock.
        records: How many are in it.
        size_bytes: How large it is.
        spooled: How many of the records have been counted as waiting for MLflow.
        synced: Whether the disk itself has it.
    """

    path: Path
    began_s: float
    records: int = 0
    size_bytes: int = 0
    spooled: int = 0
    synced: bool = False


class Spool:
    """The files of this process; a call of ``append`` from any thread, the rest from the recorder's.

    Args:
        folder: Shared by all processes of this service on the machine; made when it is not there.
        max_bytes: Most bytes that lie waiting; for more, the oldest file goes.
        on_lost: Called with the number of records that went, and why.
        clock: Monotonic, in seconds: a machine whose date is put right must not make its records old.

    Raises:
        OSError: The folder cannot be made, or nothing can be written in it.
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
        self.name, self._owner = _own_lock(folder)

    @property
    def files(self) -> int:
        """How many files can be taken now."""
        with self._lock:
            return len(self._sealed) + (self._open is not None)

    def append(self, line: bytes, *, spooled: bool) -> bool:
        """Write one line; whether that made a whole file.

        Args:
            line: With its line feed.
            spooled: Whether the record has been counted as waiting for MLflow.

        Raises:
            OSError: It cannot be written; nothing of it is left in the file. So after ``close``: the files
                may be an heir's already.
        """
        with self._lock:
            if self._closed:
                raise OSError(errno.EBADF, "the spool is closed")
            if len(line) > self._max_bytes:
                raise OSError(errno.EFBIG, "a line is larger than all that may wait")
            self._make_room(len(line))
            segment = self._open or self._begin()
            try:
                whole = os.write(self._descriptor, line) == len(line)
            except OSError:
                self._undo(segment)
                raise
            if not whole:
                self._undo(segment)
                raise OSError("the disk took a part of the line")
            segment.records += 1
            segment.spooled += spooled
            segment.size_bytes += len(line)
            segment.synced = False
            self._size_bytes += len(line)
            full = segment.records >= SEGMENT_RECORDS or segment.size_bytes >= SEGMENT_BYTES
            if full:
                self._seal()
            return full

    def _begin(self) -> Segment:
        path = self.folder / f"{self.name}.{self._next:06d}.jsonl"
        self._descriptor = os.open(
            path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC, 0o600
        )
        self._next += 1
        self._open = Segment(path, self._clock())
        return self._open

    def _undo(self, segment: Segment) -> None:
        # Should a torn line stay, it is the last one of its file; whoever reads it passes it over. The next
        # line gets a file of its own in any case: this one may have reached the size that a file may have.
        torn = True
        with suppress(OSError):
            os.ftruncate(self._descriptor, segment.size_bytes)
            torn = False
        if torn or segment.records:
            self._seal()

    def _make_room(self, size_bytes: int) -> None:
        while self._size_bytes + size_bytes > self._max_bytes and (self._sealed or self._open):
            if not self._sealed:
                self._seal()
            self._give_up(self._sealed.popleft(), "the spool is full")

    def _give_up(self, segment: Segment, reason: str) -> None:
        self._size_bytes -= segment.size_bytes
        with suppress(OSError):
            segment.path.unlink(missing_ok=True)
        if segment.records:
            self._on_lost(segment.records, reason)

    def _seal(self) -> None:
        if self._open is None:
            return
        with suppress(OSError):
            os.close(self._descriptor)
        self._sealed.append(self._open)
        self._open = None

    def count_spooled(self) -> int:
        """Count all that lies here as waiting for MLflow; how many were not counted before."""
        with self._lock:
            segments = [*self._sealed, *([self._open] if self._open else [])]
            new = sum(segment.records - segment.spooled for segment in segments)
            for segment in segments:
                segment.spooled = segment.records
            return new

    def take(self) -> Segment | None:
        """The oldest file, which from now on is the caller's; None when there is none."""
        with self._lock:
            if not self._sealed:
                self._seal()
            return self._sealed.popleft() if self._sealed else None

    def put_back(self, segment: Segment, *, last: bool = False) -> None:
        """Take a file back: before all others, or behind them."""
        with self._lock:
            if last:
                self._seal()
                self._sealed.append(segment)
            else:
                self._sealed.appendleft(segment)

    def done(self, segment: Segment) -> None:
        """Remove a file that was taken: MLflow has what is in it."""
        with self._lock:
            self._size_bytes -= segment.size_bytes
        with suppress(OSError):
            segment.path.unlink(missing_ok=True)

    def expire(self, max_age_s: float) -> None:
        """Give up the files that are older than this."""
        with self._lock:
            while self._sealed and self._clock() - self._sealed[0].began_s > max_age_s:
                self._give_up(self._sealed.popleft(), "too old")

    def sync(self) -> None:
        """Write what lies here through to the disk."""
        with self._lock:
            segments = [*self._sealed, *([self._open] if self._open else [])]
            unsynced = [segment for segment in segments if not segment.synced]
            for segment in unsynced:
                segment.synced = True
        for segment in unsynced:
            # Gone in the meantime, or a disk that fails: the next line will tell.
            with suppress(OSError):
                sync_file(segment.path)
        if unsynced:
            # That there are these files stands in the folder, which is written by itself.
            with suppress(OSError):
                sync_file(self.folder)

    def close(self) -> None:
        """Let go of the files: whoever comes next is their heir. Nothing is left behind of an empty spool."""
        with self._lock:
            self._closed = True
            self._seal()
            if not files_of(self.folder, self.name):
                with suppress(OSError):
                    lock_path(self.folder, self.name).unlink(missing_ok=True)
            os.close(self._owner)


def _own_lock(folder: Path) -> tuple[str, int]:
    """Choose a name that nobody has, and hold its lock until the process ends."""
    while True:
        moment = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
        name = f"{moment}-{os.getpid()}-{secrets.token_hex(3)}"
        path = lock_path(folder, name)
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            # Between the two an heir may have come by, and taken it for a dead one's.
            if hold(descriptor, path):
                return name, descriptor
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)


def hold(descriptor: int, path: Path) -> bool:
    """Lock a file that was opened at this path; whether it is ours now, and is there still.

    Whoever has a lock removes it with the last of the files. One that was opened before and locked after
    that keeps nobody out.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return path.stat().st_ino == os.fstat(descriptor).st_ino
    except (BlockingIOError, FileNotFoundError):
        return False


def run_file(folder: Path, name: str) -> Path:
    """Where a process's run is written down."""
    return folder / f"{name}.run.json"


def lock_path(folder: Path, name: str) -> Path:
    """What a process holds while it lives."""
    return folder / f"{name}.lock"


def files_of(folder: Path, name: str) -> list[Path]:
    """What lies there under a name, but for its lock."""
    return sorted(path for path in folder.glob(f"{name}.*") if path.suffix != ".lock")


def sync_file(path: Path) -> None:
    """Write a file through to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class Estate:
    """What a dead process left behind."""

    folder: Path
    name: str

    @property
    def segments(self) -> list[Path]:
        """Its files of lines, oldest first."""
        return [path for path in files_of(self.folder, self.name) if path.suffix == ".jsonl"]

    @property
    def run_file(self) -> Path:
        """Where its run is written down."""
        return run_file(self.folder, self.name)

    @property
    def last_seen_s(self) -> float:
        """When the process was last seen alive, in Unix time."""
        paths = [*self.segments, self.run_file]
        return max((path.stat().st_mtime for path in paths if path.exists()), default=time.time())

    def expire(self, max_age_s: float) -> int:
        """Remove the files that are older; how many records went with them."""
        gone = 0
        for path in self.segments:
            # One that cannot be read is in nobody's way.
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > max_age_s:
                    records, garbled = read(path)
                    path.unlink()
                    gone += len(records) + garbled
        return gone

    def clear(self) -> None:
        """Remove what is left; its lock goes with it, when the next estate is asked for."""
        for path in files_of(self.folder, self.name):
            path.unlink(missing_ok=True)


def estates(folder: Path) -> Generator[Estate]:
    """Each dead process's files, oldest first; held until the next is asked for, and tidied when empty.

    Raises:
        OSError: The folder cannot be read.
    """
    try:
        names = {path.name.split(".", 1)[0] for path in folder.iterdir()}
    except FileNotFoundError:
        return
    for name in sorted(filter(OWNER.fullmatch, names)):
        with _inherited(folder, name) as held:
            # Nothing is there where another heir was quicker, or where a process ended between two steps.
            if held and files_of(folder, name):
                yield Estate(folder, name)


@contextmanager
def _inherited(folder: Path, name: str) -> Iterator[bool]:
    """Hold a process's lock, where it is dead; removes the lock with the last of the files."""
    path = lock_path(folder, name)
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError:
        yield False
        return
    try:
        held = False
        with suppress(OSError):
            held = hold(descriptor, path)
        yield held
        if held and not files_of(folder, name):
            path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)
