"""The writer: stores answers after they were given, in batches, from a bounded queue."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from opentelemetry.context import Context
from opentelemetry.trace import Link, SpanContext

from service.cache.store import COLLECTION, GuardedStore, Point, StoreError
from service.telemetry import names
from service.telemetry.providers import SCOPE, Telemetry

MAX_WAITING = 5_000
BATCH = 64
RETRY_S = 1.0
MAX_TRIES = 20
"""How often a batch is tried before it is given up: the batch itself may be what the store rejects."""

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Write:
    """One point to be written.

    Args:
        collection: Its collection.
        build: Makes the point when it is written.
        size_bytes: Approximate size while it waits.
        expires_at: When it is not worth writing any more; Unix time in seconds.
        origin: The span of the call that it comes from.
        tenant: Whose answer it is.
        model: The model that was asked.
        tries: How often writing it has failed.
    """

    collection: str
    build: Callable[[], Point]
    size_bytes: int
    expires_at: float
    origin: SpanContext
    tenant: str = ""
    model: str = ""
    tries: int = 0


class CacheWriter:
    """Takes points without waiting and writes them later; drops them when too many wait.

    Args:
        store: Where they are written.
        telemetry: Where stored, dropped and failed entries are counted, and each batch gets a root span.
        max_bytes: Limit of what waits.
        on_written: Called after each batch with its number of points.
        sleep: Waits this many seconds after a failure.
    """

    def __init__(
        self,
        store: GuardedStore,
        telemetry: Telemetry,
        max_bytes: int,
        *,
        on_written: Callable[[int], None] = lambda _points: None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._store = store
        self._outcomes = telemetry.instruments.cache_writes
        self._tracer = telemetry.tracer_provider.get_tracer(SCOPE)
        self._max_bytes = max_bytes
        self._on_written = on_written
        self._sleep = sleep
        self._queue: deque[Write] = deque()
        self._writing = asyncio.Lock()
        self._not_empty = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()
        self.waiting_bytes = 0
        self.dropped = 0

    @property
    def waiting(self) -> int:
        """Points that are not written yet."""
        return len(self._queue)

    def put(self, write: Write) -> None:
        """Queue a point, or drop it when too much waits."""
        if len(self._queue) >= MAX_WAITING or self.waiting_bytes + write.size_bytes > self._max_bytes:
            self._count_dropped([write], "dropped")
            return
        self._queue.append(write)
        self.waiting_bytes += write.size_bytes
        self._empty.clear()
        self._not_empty.set()

    @asynccontextmanager
    async def paused(self, *, tenant: str | None = None, model: str | None = None) -> AsyncIterator[None]:
        """Discard what waits of this tenant and this model, or all, and write nothing during the block."""
        self.discard(tenant, model)
        async with self._writing:
            yield

    async def run(self) -> None:
        """Write until cancelled."""
        with suppress(StoreError):
            await self._prepare()
        while True:
            await self._not_empty.wait()
            try:
                written = await self._write_batch()
            except Exception:
                # An exception here would end the lifespan's task group; the batch is given up instead.
                logger.exception("The cache could not write")
                written = False
                batch = self._next_batch()
                self._remove(batch)
                self._count_dropped(batch, "failed")
            if not written:
                await self._sleep(RETRY_S)

    async def _prepare(self) -> None:
        """Create the collection before the first look-up needs it."""
        with self._tracer.start_as_current_span(
            names.SPAN_CACHE_WRITE, context=Context(), attributes={names.ATTR_CACHE_ENTRIES: 0}
        ):
            await self._store.prepare(COLLECTION)

    async def flush(self, timeout_s: float) -> None:
        """Write what waits within the time limit; the rest is dropped and counted."""
        try:
            async with asyncio.timeout(timeout_s):
                while self._queue:
                    if not await self._write_batch():
                        break
        except TimeoutError:
            pass
        self._count_dropped(list(self._queue), "dropped")
        self._queue.clear()
        self.waiting_bytes = 0
        self._note_empty()

    async def wait_until_empty(self, timeout_s: float) -> None:
        """Wait until nothing waits, or until the time limit."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._empty.wait()
        except TimeoutError:
            return

    async def _write_batch(self) -> bool:
        """Write the oldest points; whether there is no failure to wait for.

        Points stay in the queue until the store has them.
        """
        async with self._writing:
            batch = self._next_batch()
            if not batch:
                self._note_empty()
                return True
            # A root span: the calls that the points come from are over.
            with self._tracer.start_as_current_span(
                names.SPAN_CACHE_WRITE,
                context=Context(),
                links=[Link(write.origin) for write in batch],
                attributes={names.ATTR_CACHE_ENTRIES: len(batch)},
            ):
                try:
                    # In a thread: to compress a batch of large answers takes a second.
                    points = await asyncio.to_thread(lambda: [write.build() for write in batch])
                    await self._store.write(batch[0].collection, points)
                except StoreError:
                    for write in batch:
                        write.tries += 1
                    if batch[0].tries < MAX_TRIES:
                        return False
                    self._remove(batch)
                    self._count_dropped(batch, "failed")
                    return True
            self._remove(batch)
            self._outcomes.add(len(batch), {"outcome": "stored"})
            self._on_written(len(batch))
            return True

    def _next_batch(self) -> list[Write]:
        """The oldest points of one collection; expired points are removed."""
        now = time.time()
        while self._queue and self._queue[0].expires_at <= now:
            self._remove([self._queue[0]])
        batch: list[Write] = []
        for write in self._queue:
            if len(batch) == BATCH or write.collection != self._queue[0].collection:
                break
            batch.append(write)
        return batch

    def _remove(self, batch: Sequence[Write]) -> None:
        for write in batch:
            # The queue may have been cleared meanwhile.
            if self._queue and self._queue[0] is write:
                self._queue.popleft()
                self.waiting_bytes -= write.size_bytes
        self._note_empty()

    def discard(self, tenant: str | None, model: str | None) -> None:
        """Remove what waits of this tenant and this model, whose answers are being cleared."""
        kept: deque[Write] = deque()
        cleared = 0
        for write in self._queue:
            if tenant in {None, write.tenant} and model in {None, write.model}:
                cleared += 1
                self.waiting_bytes -= write.size_bytes
            else:
                kept.append(write)
        self._queue = kept
        if cleared:
            self._outcomes.add(cleared, {"outcome": "cleared"})
        self._note_empty()

    def _note_empty(self) -> None:
        if not self._queue:
            self._not_empty.clear()
            self._empty.set()

    def _count_dropped(self, writes: Sequence[Write], outcome: str) -> None:
        if writes:
            self.dropped += len(writes)
            self._outcomes.add(len(writes), {"outcome": outcome})
