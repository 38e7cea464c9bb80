"""Writes log lines to stdout from a thread of its own, so that nobody who logs waits for a reader."""

import os
import queue
import threading
import time
from contextlib import suppress
from multiprocessing.util import Finalize

MAX_LINES = 10_000
"""Lines that wait at most, while nobody reads; further ones are dropped and counted."""

FLUSH_LIMIT_S = 1.0
PAUSE_S = 0.002
"""So long the thread lets further lines come before it writes them together. Waking it for each line would
take the interpreter from the event loop three times a request: 0.1 ms each on a busy machine."""

STDOUT = 1


class LineWriter:
    """A stream for a logging handler: takes text at once, and writes it when the other side reads.

    A pipe whose reader has stopped would otherwise stop the event loop at the next line. Writing goes to the
    file descriptor: there is no buffer left that could fail when the interpreter ends.

    Args:
        descriptor: The file descriptor to write to.
        max_lines: Lines that may wait.
    """

    def __init__(self, descriptor: int = STDOUT, max_lines: int = MAX_LINES) -> None:
        self._descriptor = descriptor
        self._waiting: queue.SimpleQueue[str | threading.Event] = queue.SimpleQueue()
        self._max_lines = max_lines
        self._dropped = 0
        self._writing = threading.Thread(target=self._write, name="log lines", daemon=True)
        self._writing.start()
        # Unlike atexit, this runs at the end of a worker process too.
        Finalize(None, self.drain, exitpriority=0)

    @property
    def dropped(self) -> int:
        """Lines lost so far because nobody read."""
        return self._dropped

    def write(self, text: str) -> None:
        """Take a text; never waits."""
        if self._waiting.qsize() >= self._max_lines:
            self._dropped += 1
        else:
            self._waiting.put(text)

    def flush(self) -> None:
        """Nothing to do: a handler calls this after each line."""

    def drain(self, limit_s: float = FLUSH_LIMIT_S) -> None:
        """Wait until all lines so far are written, or the time is over."""
        written = threading.Event()
        self._waiting.put(written)
        written.wait(limit_s)

    def _write(self) -> None:
        while True:
            taken = [self._waiting.get()]
            time.sleep(PAUSE_S)
            with suppress(queue.Empty):
                while True:
                    taken.append(self._waiting.get_nowait())
            data = "".join(text for text in taken if isinstance(text, str)).encode("utf-8", "replace")
            # A full disk or a reader who left: the line is lost, the process goes on.
            with suppress(OSError):
                while data:
                    data = data[os.write(self._descriptor, data) :]
            for text in taken:
                if isinstance(text, threading.Event):
                    text.set()
