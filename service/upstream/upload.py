"""A request's body that is passed on to the upstream as it arrives, instead of being held."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, MutableMapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar

from service.errors import ServiceError
from service.utils.deadline import Deadline

T = TypeVar("T")


class Upload:
    """A body whose beginning was read, and whose rest is still arriving.

    The time in which the rest is awaited from the caller is not the upstream's: ``clock`` stands still then,
    and so does the limit of an attempt.

    Args:
        content_type: The body's.
        start: What was read of it; kept, so that an attempt which took no more can be repeated.
        rest: Yields the rest, and raises what is wrong with it; None where there is none.
        size: The size of all of it in bytes; None where the caller has not declared it.
    """

    def __init__(
        self, content_type: str, start: list[bytes], rest: AsyncIterator[bytes] | None, size: int | None
    ) -> None:
        self.content_type = content_type
        self._start = start
        self._rest = rest
        self.size = size
        self._waited_s = 0.0
        self._waits_since: float | None = None
        self._limit: tuple[asyncio.Timeout, Deadline] | None = None
        self._took_rest = False
        self._over = asyncio.Event()
        self._stop: Callable[[], None] | None = None
        self.failure: ServiceError | None = None
        """What was wrong with the rest, or with the caller."""
        if rest is None:
            self._over.set()

    @property
    def is_spent(self) -> bool:
        """Whether an attempt has taken of the rest, which nobody can send again."""
        return self._took_rest

    def clock(self) -> float:
        """Monotonic seconds, without those in which the caller was awaited."""
        now = time.monotonic()
        waiting = 0.0 if self._waits_since is None else now - self._waits_since
        return now - self._waited_s - waiting

    @contextmanager
    def pausing(self, limit: asyncio.Timeout, deadline: Deadline) -> Iterator[None]:
        """Let the limit around an attempt stand still while the caller is awaited."""
        self._limit = limit, deadline
        try:
            yield
        finally:
            self._limit = None

    @asynccontextmanager
    async def raising_failure(self) -> AsyncIterator[None]:
        """End the block with what goes wrong with the rest of the body, while the upstream is answering."""
        loop = asyncio.get_running_loop()
        try:
            # Expires when it is told to.
            async with asyncio.timeout(None) as limit:
                self._stop = lambda: limit.reschedule(loop.time())
                if self.failure is not None:
                    self._stop()
                yield
        except TimeoutError:
            if not limit.expired() or self.failure is None:
                raise
        finally:
            self._stop = None
        if self.failure is not None:
            raise self.failure

    async def content(self) -> AsyncGenerator[bytes, None]:
        """The body, for one attempt."""
        for piece in self._start:
            yield piece
        if self._rest is None:
            return
        self._took_rest = True
        try:
            while (piece := await self._awaited(anext(self._rest, b""))) != b"":
                yield piece
        except ServiceError as error:
            self.failure = error
            if self._stop is not None:
                self._stop()
            raise
        finally:
            self._over.set()

    async def _awaited(self, piece: Awaitable[T]) -> T:
        """Await the caller, on the caller's time."""
        self._waits_since = time.monotonic()
        self._reschedule(None)
        try:
            return await piece
        finally:
            self._waited_s += time.monotonic() - self._waits_since
            self._waits_since = None
            self._reschedule(asyncio.get_running_loop().time())

    def _reschedule(self, now_s: float | None) -> None:
        """Let the attempt's limit begin again with what is left; without a time, let it stand still."""
        # An attempt that is over, or about to be, has no limit to change.
        if self._limit is not None and not self._limit[0].expired():
            limit, deadline = self._limit
            limit.reschedule(None if now_s is None else now_s + deadline.left_s)

    def receive_after(
        self, receive: Callable[[], Awaitable[MutableMapping[str, Any]]]
    ) -> Callable[[], Awaitable[MutableMapping[str, Any]]]:
        """An ASGI ``receive`` that begins when the body is over: nobody else may take its messages."""

        async def after() -> MutableMapping[str, Any]:
            await self._over.wait()
            return await receive()

        return after
