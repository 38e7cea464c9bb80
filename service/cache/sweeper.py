"""The sweeper: removes expired, surplus and damaged entries from the store, in the background."""

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager

from opentelemetry.context import Context
from opentelemetry.trace import Span, Tracer

from service.cache.store import OLDEST_FIRST, GuardedStore, StoreError, expired_at
from service.telemetry import names

INTERVAL_S = 60.0
FAILED_WAIT_S = 1.0
PAGE = 1_000
MAX_PAGES = 50
"""Pages that one sweep removes from a collection at most; the rest is left to the next sweep."""

EARLY_SHARE = 1 / 20
"""A sweep comes early when this share of the permitted entries has been written since the last one."""

MAX_MARKED = 1_000

logger = logging.getLogger(__name__)


class CacheSweeper:
    """Keeps the store within its limits.

    Args:
        store: The store.
        max_entries: How many points a collection may have.
        tracer: For the root span of each sweep.
        interval_s: Seconds between two sweeps.
        now: Unix time in seconds.
    """

    def __init__(
        self,
        store: GuardedStore,
        max_entries: int,
        tracer: Tracer,
        *,
        interval_s: float = INTERVAL_S,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._max_entries = max_entries
        self._tracer = tracer
        self._interval_s = interval_s
        self._now = now
        self._written = 0
        self._wake = asyncio.Event()
        self._marked: dict[str, set[str]] = defaultdict(set)

    def mark_for_removal(self, collection: str, point_id: str) -> None:
        """Have a point removed soon."""
        if len(self._marked[collection]) < MAX_MARKED:
            self._marked[collection].add(point_id)
        self._wake.set()

    def count_written(self, points: int) -> None:
        """Note that points were written; many of them bring the next sweep forward."""
        self._written += points
        if self._many_written:
            self._wake.set()

    @property
    def _many_written(self) -> bool:
        return self._written >= self._max_entries * EARLY_SHARE

    async def run(self) -> None:
        """Sweep until cancelled."""
        while True:
            due = False
            try:
                async with asyncio.timeout(self._interval_s):
                    await self._wake.wait()
            except TimeoutError:
                due = True
            self._wake.clear()
            try:
                if due or self._many_written:
                    await self.sweep()
                else:
                    with self._span():
                        await self._remove_marked()
            except StoreError:
                # Logged by the store; the next sweep removes what this one did not.
                await asyncio.sleep(FAILED_WAIT_S)
            except Exception:
                # An exception here would end the lifespan's task group, and the process.
                logger.exception("The cache could not be swept")
                await asyncio.sleep(FAILED_WAIT_S)

    def _span(self) -> AbstractContextManager[Span]:
        return self._tracer.start_as_current_span(
            names.SPAN_CACHE_SWEEP, context=Context(), record_exception=False, set_status_on_exception=False
        )

    async def sweep(self) -> int:
        """Sweep once; the number of points removed. Raises ``StoreError``."""
        self._written = 0
        with self._span() as span:
            removed = await self._remove_marked()
            for collection in await self._store.collections():
                removed += await self._remove_expired(collection)
                removed += await self._remove_surplus(collection)
            span.set_attribute(names.ATTR_CACHE_ENTRIES, removed)
        return removed

    async def _remove_marked(self) -> int:
        removed = 0
        while self._marked:
            collection, ids = self._marked.popitem()
            await self._store.delete(collection, list(ids))
            removed += len(ids)
        return removed

    async def _remove_expired(self, collection: str) -> int:
        removed = 0
        for _ in range(MAX_PAGES):
            ids = await self._store.ids(collection, PAGE, expired_at(self._now()))
            await self._store.delete(collection, ids)
            removed += len(ids)
            if len(ids) < PAGE:
                break
        return removed

    async def _remove_surplus(self, collection: str) -> int:
        removed = 0
        surplus = await self._store.count(collection) - self._max_entries
        for _ in range(MAX_PAGES):
            if removed >= surplus:
                break
            ids = await self._store.ids(collection, min(PAGE, surplus - removed), order_by=OLDEST_FIRST)
            if not ids:
                break
            await self._store.delete(collection, ids)
            removed += len(ids)
        return removed
