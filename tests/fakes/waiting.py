"""What the threaded fakes share: a lock, and waiting for what they record without polling."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable


class Watched:
    """A recorder that another thread fills and whose changes a test can wait for."""

    def __init__(self) -> None:
        # Its lock is re-entrant, so a predicate may use the locked properties of the fake.
        self._changed = threading.Condition()

    def wait_for(self, predicate: Callable[[Self], bool], timeout_s: float = 5.0) -> None:
        """Block until the predicate holds for this fake; raise TimeoutError when it never does."""
        with self._changed:
            if not self._changed.wait_for(lambda: predicate(self), timeout_s):
                raise TimeoutError(f"still not so after {timeout_s} s: {self!r}")
