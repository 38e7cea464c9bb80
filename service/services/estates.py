"""What dead processes left in the spool, for whoever brings it to its end."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from service.services.spool import OWNER, files_of, lock_path, run_file


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

    def clear(self) -> None:
        """Remove what is left; its lock goes with it, when the next estate is asked for."""
        for path in files_of(self.folder, self.name):
            path.unlink(missing_ok=True)


def estates(folder: Path) -> Iterator[Estate]:
    """Each dead process's files, oldest first; held until the next is asked for, and tidied when empty."""
    names = {path.name.split(".", 1)[0] for path in folder.glob("*.*")}
    for name in sorted(filter(OWNER.fullmatch, names)):
        with _inherited(folder, name) as held:
            if held:
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
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True
        if not files_of(folder, name):
            path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)
