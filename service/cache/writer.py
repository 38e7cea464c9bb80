"""Writes what was answered into the store, after the answer: from a bounded queue, in batches."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from opentelemetry.context import Context
from opentelemetry.trace import Link, SpanContext, Tracer

from service.cache.store import COLLECTION, CacheStore, Point, StoreError
from service.telemetry import names
from service.telemetry.instruments import Instruments

MAX_WAITING = 5_000
BATCH = 64
RETRY_S = 1.0
MAX_TRIES = 20
"""So often the store may refuse one batch before it is given up: it may be the batch's fault."""

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Write:
    """One point on its way.

    Args:
        collection: Where it goes.
        build: Makes the point, when it is written.
        size_bytes: What it takes while it waits, roughly.
        expires_at: When it is not worth writing any more; Unix time in seconds.
        origin: The span of the call that it comes from.
    """

    collection: str
    build: Callable[[], Point]
    size_bytes: int
    expires_at: float
    origin: SpanContext
    tries: int = 0


class CacheWriter:
    """Takes points at once, writes them later, and loses them rather than wait.

    Args:
        store: Where they go.
        instruments: Where stored, dropped and failed entries are counted.
        tracer: For one root span a batch, linked with the calls.
        max_bytes: What may wait.
        after: Called after each batch, with the number of points in it.
        now: Unix time in seconds.
        sleep: Waits so many seconds after a failure.
    """

    def __init__(  # noqa: PLR0913 - ends, a bound and seams
        self,
        store: CacheStore,
        instruments: Instruments,
        tracer: Tracer,
        max_bytes: int,
        *,
        after: Callable[[int], None] = lambda _count: None,
        now: Callable[[], float] = time.time,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._store = store
        self._outcomes = instruments.cache_writes
        self._tracer = tracer
        self._max_bytes = max_bytes
        self._after = after
        self._now = now
        self._sleep = sleep
        self._waiting: deque[Write] = deque()
        self._writing = asyncio.Lock()
        self._some = asyncio.Event()
        self._none = asyncio.Event()
        self._none.set()
        self.waiting_bytes = 0
        self.dropped = 0

    @property
    def waiting(self) -> int:
        """Points that are not in the store yet."""
        return len(self._waiting)

    def put(self, write: Write) -> None:
        """Take a point, unless too much waits; never waits itself."""
        if len(self._waiting) >= MAX_WAITING or self.waiting_bytes + write.size_bytes > self._max_bytes:
            self._drop([write], "dropped")
            return
        self._waiting.append(write)
        self.waiting_bytes += write.size_bytes
        self._none.clear()
        self._some.set()

    @asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        """Forget what waits, and write nothing during the block: the store is being cleared."""
        self._forget()
        async with self._writing:
            yield

    def _forget(self) -> None:
        self._waiting.clear()
        self.waiting_bytes = 0
        self._settle()

    async def run(self) -> None:
        """Write for ever; ends by cancellation only."""
        with suppress(StoreError):
            await self._prepare()
        while True:
            await self._some.wait()
            try:
                written = await self._write_batch()
            except Exception:
                # A bug here must not end the writing, nor the lifespan; its batch is given up.
                logger.exception("The cache could not write")
                written = False
                self._drop(self._take_batch(), "failed")
            if not written:
                await self._sleep(RETRY_S)

    async def _prepare(self) -> None:
        """Have the collection there before the first question."""
        with self._tracer.start_as_current_span(
            names.SPAN_CACHE_WRITE, context=Context(), attributes={names.ATTR_CACHE_ENTRIES: 0}
        ):
            await self._store.prepare(COLLECTION)

    async def flush(self, limit_s: float) -> None:
        """Write what waits, within the limit; what cannot be written then is lost, and counted."""
        try:
            async with asyncio.timeout(limit_s):
                while self._waiting:
                    if not await self._write_batch():
                        break
        except TimeoutError:
            pass
        self._drop(list(self._waiting), "dropped")
        self._forget()

    async def idle(self, limit_s: float) -> None:
        """Wait until nothing waits, or for so long."""
        try:
            async with asyncio.timeout(limit_s):
                await self._none.wait()
        except TimeoutError:
            return

    async def _write_batch(self) -> bool:
        """Write the oldest points; they leave the queue when the store has them. Whether that worked."""
        async with self._writing:
            return await self._write(self._batch())

    async def _write(self, batch: list[Write]) -> bool:
        if not batch:
            self._settle()
            return True
        # A root of its own: the calls are over, and nobody waits for this.
        with self._tracer.start_as_current_span(
            names.SPAN_CACHE_WRITE,
            context=Context(),
            links=[Link(write.origin) for write in batch],
            attributes={names.ATTR_CACHE_ENTRIES: len(batch)},
        ):
            try:
                await self._store.write(batch[0].collection, [write.build() for write in batch])
            except StoreError:
                for write in batch:
                    write.tries += 1
                if batch[0].tries < MAX_TRIES:
                    return False
                self._remove(batch)
                self._drop(batch, "failed")
                return True
        self._remove(batch)
        self._outcomes.add(len(batch), {"outcome": "stored"})
        self._after(len(batch))
        return True

    def _batch(self) -> list[Write]:
        """The oldest points, all for one collection, without those that are not good any more."""
        now = self._now()
        while self._waiting and self._waiting[0].expires_at <= now:
            self._remove([self._waiting[0]])
        batch: list[Write] = []
        for write in self._waiting:
            if len(batch) == BATCH or write.collection != self._waiting[0].collection:
                break
            batch.append(write)
        return batch

    def _take_batch(self) -> list[Write]:
        batch = self._batch()
        self._remove(batch)
        return batch

    def _remove(self, batch: Sequence[Write]) -> None:
        # Cleared meanwhile, the queue may not hold them any more.
        for write in batch:
            if self._waiting and self._waiting[0] is write:
                self._waiting.popleft()
                self.waiting_bytes -= write.size_bytes
        self._settle()

    def _settle(self) -> None:
        if not self._waiting:
            self._some.clear()
            self._none.set()

    def _drop(self, writes: Sequence[Write], outcome: str) -> None:
        if writes:
            self.dropped += len(writes)
            self._outcomes.add(len(writes), {"outcome": outcome})
