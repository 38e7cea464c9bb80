"""What dead processes left in the spool, for whoever brings it to its end."""

import os
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from service.clients.call_record import read
from service.services.spool import OWNER, files_of, hold, lock_path, run_file


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
