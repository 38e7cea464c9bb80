"""The service on a disk that hangs while a file exists; run as a script in place of ``python -m service``.

Each call that would reach the folder ``SPOOL_PATH`` waits in the operating system, as one to a disk that does
not answer does: it opens the named pipe ``HANG_PIPE`` for reading, which blocks until somebody opens it for
writing.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from service.__main__ import main

PIPE = os.environ["HANG_PIPE"]
FOLDER = os.environ["SPOOL_PATH"]
BY_PATH = ("open", "unlink", "rename", "replace", "listdir", "scandir", "stat", "mkdir")
BY_DESCRIPTOR = ("write", "fsync", "ftruncate", "close")

open_file = os.open
close_file = os.close


def _hang() -> None:
    try:
        close_file(open_file(PIPE, os.O_RDONLY))
    except FileNotFoundError:
        return


def _path_of(descriptor: int) -> str:
    try:
        return str(Path(f"/proc/self/fd/{descriptor}").readlink())
    except OSError:
        return ""


def _slow(function: Callable[..., Any], path_of: Callable[[Any], str]) -> Callable[..., Any]:
    def call(first: Any, *arguments: Any, **options: Any) -> Any:
        if path_of(first).startswith(FOLDER):
            _hang()
        return function(first, *arguments, **options)

    return call


if __name__ == "__main__":
    for name in BY_PATH:
        setattr(os, name, _slow(getattr(os, name), str))
    for name in BY_DESCRIPTOR:
        setattr(os, name, _slow(getattr(os, name), _path_of))
    sys.exit(main())
