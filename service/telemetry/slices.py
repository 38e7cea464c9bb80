"""Work in a thread that lets the event loop run between its items.

Python lets a thread hold the interpreter for 5 ms before another one has its turn, and a call takes less than
that. Threads that encode many spans, log lines or records pause after a few of them instead.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final, TypeVar, overload

T = TypeVar("T")

FEWEST: Final = 16
"""Items between two pauses; to encode one takes some 60 µs. A pause makes the threads wake each other: at one
connection a call took 9 % more processor time with a pause after each four items, and takes 2 % more now."""

MOST: Final = 256

PAUSE_S: Final = 50e-6
"""A pause of 0 s lets nobody else run: the thread has the interpreter back before another one is awake."""

BUSY_S: Final = 2e-3
"""A pause that takes longer shows that the event loop has no time to spare."""


class Slices(Sequence[T]):
    """A sequence whose iteration pauses after each few items, for use in a thread beside the event loop's.

    Each pause that takes long, because others need the interpreter all the time, doubles the items before the
    next one, as the work would never be done otherwise. Each short one halves them.

    Args:
        items: What is iterated.
        sleep: Pauses for so many seconds.
        clock: In seconds.
    """

    def __init__(
        self,
        items: Sequence[T],
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._items = items
        self._sleep = sleep
        self._clock = clock

    def __len__(self) -> int:
        return len(self._items)

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...

    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        return self._items[index]

    def __iter__(self) -> Iterator[T]:
        size = left = FEWEST
        for item in self._items:
            if left == 0:
                size = left = self._pause(size)
            left -= 1
            yield item

    def _pause(self, size: int) -> int:
        """Pause; how many items come before the next pause."""
        began_s = self._clock()
        self._sleep(PAUSE_S)
        busy = self._clock() - began_s > BUSY_S
        return min(MOST, 2 * size) if busy else max(FEWEST, size // 2)
